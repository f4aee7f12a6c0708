"""Our models under the names of other libraries: import the module named like the library."""

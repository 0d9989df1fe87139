"""What an op must do with drawn cases, one file for each op: run by the tests of every backend."""

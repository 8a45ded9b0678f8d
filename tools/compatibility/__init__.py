"""One wheel on every Python and torch that it is for: `make compatibility`."""

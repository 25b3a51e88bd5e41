"""Selection methods to compare STAFF with, one file each, with the interface of `staff.selection`."""

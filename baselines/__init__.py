"""Selection methods that STAFF is compared with, one file each, all with the interface of `staff.selection`."""

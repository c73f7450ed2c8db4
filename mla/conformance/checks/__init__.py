"""The checks: of the device, of the ops on offer, of each op by a table of borders, of a whole layer."""

"""What the device can do at best, and where a number stands below it."""

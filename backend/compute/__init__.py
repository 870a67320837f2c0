"""What runs only inside a rank: everything that touches a device."""

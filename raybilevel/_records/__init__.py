"""What runs leave behind on disk. No Ray."""

"""Models whose first layer a malicious server can arm."""

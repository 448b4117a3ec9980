"""What is chosen for a call, from its step, shape, device and settings; runs nothing."""

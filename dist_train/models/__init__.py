"""Nets by name (ours, torchvision's, timm's, the user's) and the tasks that they are trained for."""

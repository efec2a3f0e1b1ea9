"""Nets by name: ours, torchvision's, timm's and the user's."""

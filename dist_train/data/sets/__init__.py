"""Data sets: the bundled MNIST, torchvision sets by name, image folders and user-defined sets."""

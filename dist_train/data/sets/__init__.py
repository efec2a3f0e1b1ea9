"""Data sets: the bundled MNIST, torchvision's by name, folders of pictures, the user's own."""

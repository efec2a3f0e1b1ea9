"""What examines the product itself: verify, bench, doctor, simulate."""

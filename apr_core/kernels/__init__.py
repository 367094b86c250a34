"""Fast operations, each registered beside the plain numpy function that says what it must compute."""

"""What tests of selection methods on arrays share: a pool of arrays, and the recorded vectors."""

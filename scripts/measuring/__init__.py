"""What the benches share: shapes with random weights, floors, workloads, clocks. The server knows nothing of it."""

"""What several tests share: real ranks, processes, hosts and clusters, and what their runs left."""

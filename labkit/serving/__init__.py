"""A policy in use: the core that answers requests, an HTTP server and its client, a ROS 2 node, a monitor; and what makes a policy faster."""

"""Network: send away what a student may not have, or talk to whatever listens on the grader's machine."""

from tests.attacks.attack import OPEN, REACHED, on_count

ATTACKS = [
    on_count("connect", REACHED, "connects to a server on this machine", f"""
import socket
with socket.create_connection(("127.0.0.1", @PORT@), timeout=1):
    raise RuntimeError("{OPEN}")
"""),
    on_count("datagram", REACHED, "sends a datagram to a server on this machine", f"""
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @PORT@))
raise RuntimeError("{OPEN}")
"""),
    on_count("ask-for-a-name", REACHED, "opens what a question for a name goes out by", f"""
import socket
socket.getaddrinfo("localhost", 80)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.53", 53))
raise RuntimeError("{OPEN}")
"""),
    on_count("listen", REACHED, "opens a server, which the next submission could ask for answers", f"""
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    raise RuntimeError("{OPEN}")
"""),
    on_count("abstract-socket", REACHED, "opens a socket without a place on the disk, which no file rule sees", f"""
import socket
with socket.socket(socket.AF_UNIX) as server:
    server.bind("\\0labkit-attack-@PORT@")
    raise RuntimeError("{OPEN}")
"""),
    on_count("kernel-socket", REACHED, "asks the kernel for the network's addresses", f"""
import socket
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
    kernel.bind((0, 0))
    raise RuntimeError("{OPEN}")
"""),
]

"""`doctor`: what works on this machine, as a table. How it is found out is in labkit/doctor.py."""

HELP = "say what works here: versions, memory, GPU, 4-bit weights, physics, isolation"
NEEDS_PACKAGES = False


def add_arguments(parser):
    pass


def main(args):
    from labkit.doctor import report

    missing = []
    for name, status, detail in report():
        print(f"{name:<16} {status:<9} {detail}", flush=True)
        if status == "MISSING":
            missing.append(name)
    if not missing:
        print("\nAll that the course needs works here.")
        return 0
    print(f"\nMissing: {', '.join(missing)}. `python3 -m labkit lab` installs the packages; the rest comes with the repository.")
    return 1

"""Try the service without an account: `python -m tests.modal.local_modal`, then deploy from another shell."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from tests.modal.local_modal import Plane


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Plane(Path(folder) / "plane") as plane:
        print("A local Modal control plane is running. In another shell:\n")
        for name, value in plane.env.items():
            print(f"  export {name}={value}")
        print("\nIt runs containers on this machine, on its CPU: deploy with MODEL_ID=smollm2-135m-instruct.")
        print("Ctrl-C ends it, and all that it holds.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()

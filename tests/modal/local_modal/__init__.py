"""A small Modal control plane for one machine, so that the real client and the real container runtime can be tested.

The unmodified `modal` command and `modal.Cls` talk to it over gRPC, and it runs Modal's own container entry point in
subprocesses. It builds no images: a container sees a folder that holds exactly the files the image ships, and the
packages of the Python that runs the tests.
"""

from tests.modal.local_modal.plane import Plane

__all__ = ["Plane"]

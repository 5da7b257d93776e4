"""The messages of Kubernetes's CRI that a kubelet of the tests needs, generated from the .proto file beside this one.

Those of the image service are the snapshotter's own, because a message may be defined only once in a process. Made as
those are:
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tests/helpers/proto/*.proto
"""

"""The messages of Kubernetes's CRI that pass through the snapshotter, generated from the .proto file beside this one.

Made with the oldest protoc whose Python code every supported protobuf takes (grpcio-tools 1.51), and checked in:
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. snapshotter/proto/*.proto
"""

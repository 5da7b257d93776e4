"""The messages of containerd's services, generated from the .proto files beside this one.

Made with the oldest protoc whose Python code every supported protobuf takes (grpcio-tools 1.51), and checked in:
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. lazyfs/containerd/proto/*.proto
"""

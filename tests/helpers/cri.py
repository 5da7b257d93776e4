"""A kubelet's side of CRI, over containerd's own socket: pods with the host's network, containers in them, images.

    with Cri(address) as cri:
        reference = cri.pull("127.0.0.1:5000/web:1")
        pod = cri.run_pod("web")
        container = cri.start(pod, "nginx", image)
        assert cri.run(container, "nginx", "-t").code == 0

Every call has a deadline and raises CriFailed with gRPC's code and the server's words.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from snapshotter.proto import cri_images_pb2 as images
from tests.helpers.proto import cri_runtime_pb2 as runtime

CALL = 120.0  # seconds that a call may take on a busy machine


class CriFailed(Exception):
    """A call that was refused. `code` is gRPC's name, `words` what the server said."""

    def __init__(self, call: str, code: str, words: str) -> None:
        super().__init__(f"{call}: {code}: {words}")
        self.code = code
        self.words = words


@dataclass(frozen=True, slots=True)
class Pod:
    """A sandbox and the configuration that it was made with."""

    id: str
    config: images.PodSandboxConfig


@dataclass(frozen=True, slots=True)
class Said:
    """What a command in a container answered."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class State:
    """What CRI says of a container. `name` is RUNNING, EXITED, …"""

    name: str
    exit_code: int
    words: str


class Cri:
    """A client of both CRI services on one socket. Thread-safe; connects again after containerd was started again."""

    def __init__(self, address: Path, logs: Path) -> None:
        self.logs = logs  # the directory of pods' logs
        self._channel = grpc.insecure_channel(
            f"unix:{address}",
            options=(
                ("grpc.enable_http_proxy", 0),
                ("grpc.default_authority", "localhost"),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ),
        )

    def __enter__(self) -> Cri:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    # -- images

    def pull(self, image: str, *, timeout: float = CALL) -> str:
        """Pull an image; return its ID (the digest of its config)."""
        question = images.PullImageRequest(image=images.ImageSpec(image=image))
        answer = self._ask("ImageService/PullImage", question, images.PullImageResponse, timeout)
        return str(answer.image_ref)

    def image(self, image: str) -> images.Image | None:
        """Return what is known of an image, None when it isn't there."""
        question = images.ImageStatusRequest(image=images.ImageSpec(image=image))
        answer = self._ask("ImageService/ImageStatus", question, images.ImageStatusResponse)
        found: images.Image = answer.image
        return found if found.id else None

    def images(self) -> list[images.Image]:
        return list(self._ask("ImageService/ListImages", images.ListImagesRequest(), images.ListImagesResponse).images)

    def remove_image(self, image: str) -> None:
        question = images.RemoveImageRequest(image=images.ImageSpec(image=image))
        self._ask("ImageService/RemoveImage", question, images.RemoveImageResponse)

    def image_bytes(self) -> int:
        """Return the bytes that images take, as kubelet is told."""
        answer = self._ask("ImageService/ImageFsInfo", images.ImageFsInfoRequest(), images.ImageFsInfoResponse)
        return sum(int(one.used_bytes.value) for one in answer.image_filesystems)

    # -- pods and containers

    def run_pod(self, name: str) -> Pod:
        """Start a sandbox with the node's network, PID and IPC namespaces left to the pod."""
        host = images.NamespaceOption(network=images.NODE)
        security = images.LinuxSandboxSecurityContext(namespace_options=host)
        config = images.PodSandboxConfig(
            metadata=images.PodSandboxMetadata(name=name, uid=uuid.uuid4().hex, namespace="tests"),
            log_directory=str(self.logs),
            linux=images.LinuxPodSandboxConfig(security_context=security),
        )
        question = runtime.RunPodSandboxRequest(config=config)
        answer = self._ask("RuntimeService/RunPodSandbox", question, runtime.RunPodSandboxResponse)
        return Pod(answer.pod_sandbox_id, config)

    def create(self, pod: Pod, name: str, image: str, command: Sequence[str] = (), *, timeout: float = CALL) -> str:
        """Create a container; return its ID. Without a command it is the image's."""
        host = images.NamespaceOption(network=images.NODE)
        config = runtime.ContainerConfig(
            metadata=runtime.ContainerMetadata(name=name),
            image=images.ImageSpec(image=image),
            command=command,
            log_path=f"{name}.log",
            linux=runtime.LinuxContainerConfig(
                security_context=runtime.LinuxContainerSecurityContext(namespace_options=host)
            ),
        )
        question = runtime.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        answer = self._ask("RuntimeService/CreateContainer", question, runtime.CreateContainerResponse, timeout)
        return str(answer.container_id)

    def start(self, pod: Pod, name: str, image: str, command: Sequence[str] = ()) -> str:
        """Create a container and start it; return its ID."""
        container = self.create(pod, name, image, command)
        self.start_created(container)
        return container

    def start_created(self, container: str) -> None:
        question = runtime.StartContainerRequest(container_id=container)
        self._ask("RuntimeService/StartContainer", question, runtime.StartContainerResponse)

    def state(self, container: str) -> State:
        question = runtime.ContainerStatusRequest(container_id=container)
        status = self._ask("RuntimeService/ContainerStatus", question, runtime.ContainerStatusResponse).status
        name = runtime.ContainerState.Name(status.state).removeprefix("CONTAINER_")
        return State(name, status.exit_code, f"{status.reason} {status.message}".strip())

    def log(self, name: str) -> str:
        """Return what a container of that name wrote, without CRI's prefixes (time, stream, tag)."""
        path = self.logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "".join(line.split(" ", 3)[3] + "\n" for line in lines)

    def run(self, container: str, *command: str, timeout: int = 60) -> Said:
        """Run a command in a running container to its end, `timeout` seconds at most."""
        question = runtime.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout)
        answer = self._ask("RuntimeService/ExecSync", question, runtime.ExecSyncResponse, timeout + 10)
        return Said(answer.exit_code, answer.stdout.decode(errors="replace"), answer.stderr.decode(errors="replace"))

    def stop(self, container: str, grace: int = 0) -> None:
        question = runtime.StopContainerRequest(container_id=container, timeout=grace)
        self._ask("RuntimeService/StopContainer", question, runtime.StopContainerResponse)

    def remove(self, container: str) -> None:
        """Remove a container, running or not."""
        question = runtime.RemoveContainerRequest(container_id=container)
        self._ask("RuntimeService/RemoveContainer", question, runtime.RemoveContainerResponse)

    def remove_pod(self, pod: str) -> None:
        """Stop a pod and remove it with its containers."""
        question = runtime.StopPodSandboxRequest(pod_sandbox_id=pod)
        self._ask("RuntimeService/StopPodSandbox", question, runtime.StopPodSandboxResponse)
        gone = runtime.RemovePodSandboxRequest(pod_sandbox_id=pod)
        self._ask("RuntimeService/RemovePodSandbox", gone, runtime.RemovePodSandboxResponse)

    def pods(self) -> list[str]:
        """Return the IDs of all pods, stopped ones too."""
        answer = self._ask(
            "RuntimeService/ListPodSandbox", runtime.ListPodSandboxRequest(), runtime.ListPodSandboxResponse
        )
        return [str(item.id) for item in answer.items]

    def containers(self) -> list[str]:
        answer = self._ask(
            "RuntimeService/ListContainers", runtime.ListContainersRequest(), runtime.ListContainersResponse
        )
        return [str(item.id) for item in answer.containers]

    def _ask(self, call: str, question: Any, answer: Any, timeout: float = CALL) -> Any:
        method = self._channel.unary_unary(
            f"/runtime.v1.{call}",
            request_serializer=type(question).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return method(question, timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise CriFailed(call, error.code().name, str(error.details())) from None

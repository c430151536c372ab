"""Who gets in: the token of the Ray that we start, and a look at the cluster that we are about to join.

Ray reads its authentication mode when it is imported: set any later, a head demands the token that its own driver does
not send. So all of this comes before ``import ray`` and imports neither Ray nor torch.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from autoenc.errors import InputError

if TYPE_CHECKING:
    import grpc

SECONDS = 5.0                   # for each look at a cluster; Ray itself would try for minutes
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"     # the first thing that Ray's own client asks a head


def prepare_local(*, insecure: bool = False) -> None:
    """Turn token authentication on for a Ray that this process starts, and make a token where there is none.

    A new token is readable by its owner alone from the first moment; one that Ray itself wrote for everybody to read
    is closed. Without a home to keep it in, the token is for this run only (RAY_AUTH_TOKEN).

    Everything of that Ray listens on loopback alone.

    Raises :class:`InputError` for a token that cannot serve, and for RAY_AUTH_MODE=disabled without ``insecure``.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")      # Ray's switch for it, off on Linux
    if _switched_off(insecure):
        return
    if _token() is None:
        _make_token()
        if _token() is None:
            raise InputError(f"{_token_file()}: should hold Ray's token, but is a link that leads nowhere")
    if not os.environ.get("RAY_AUTH_TOKEN"):
        path = _token_file()
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path}: others on this machine may read this token, and with it run code as you: "
                             f"chmod 600 {path}, or name another with RAY_AUTH_TOKEN_PATH")
    _set_mode("token")


def knock(address: str, *, insecure: bool = False) -> str:
    """Look at the cluster at ``address`` (HOST:PORT, or auto: this machine's) before Ray is imported to join it.

    Returns the address for ``ray.init``, with RAY_AUTH_MODE set to what the cluster demands. Our token is sent only to
    a head that demands one. ``insecure`` also joins a cluster that demands none.

    Raises :class:`InputError` within seconds for anything else than a head that demands a token and accepts ours.
    """
    switched_off = _switched_off(insecure)
    where = f"--address {address}"
    if address == "auto":
        address, source = _this_machines()
        where += f" ({address!r} in {source})"
    host, port = _parse(address, where)
    error = _connect(host.strip("[]"), port)
    if error:
        raise InputError(f"{where}: nobody listens there ({error}); is the cluster up, is this its head's address?")
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        # Certificates are Ray's matter: what the head demands shows when Ray joins it.
        if _token() is None and not insecure:
            raise _no_token(where, "a token is needed")
        _set_mode("token" if _token() and not switched_off else "disabled")
        return address

    import grpc

    refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    answer = _ask(host, port, None)
    if answer == grpc.StatusCode.OK:
        if not insecure:
            raise InputError(
                f"{where}: this cluster demands no token: whoever reaches its ports can run code as you "
                "(CVE-2023-48022). Start it anew with one (ray get-auth-token --generate before ray start --head, the "
                "same token on every node), or join it as it is with --insecure")
        _set_mode("disabled")
        return address
    if answer in refused:
        token = _token()
        if token is None:
            raise _no_token(where, "this cluster demands a token")
        answer = _ask(host, port, token)
        if answer in refused:
            raise InputError(f"{where}: this cluster refuses the token in {_source()}; "
                             "ray get-auth-token on its head prints the right one")
    if answer != grpc.StatusCode.OK:
        raise InputError(f"{where}: what listens there is no Ray head ({answer.name.lower().replace('_', ' ')}): a "
                         "head's port is 6379 by default; 8265 is the dashboard's, 10001 is for ray://")
    _set_mode("token")
    return address


def _set_mode(mode: str) -> None:
    if "ray" not in sys.modules:                    # which would not notice, and contradict the processes it starts
        os.environ["RAY_AUTH_MODE"] = mode


def _switched_off(insecure: bool) -> bool:
    """Whether the person's environment turns authentication off, as only ``insecure`` permits."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() in ("", "token"):               # Ray takes everything else, a misspelling too, for disabled
        return False
    if not insecure:
        raise InputError(f"RAY_AUTH_MODE={mode} turns Ray's token off, and without it whoever reaches the ports can "
                         "run code as you: unset it, or add --insecure")
    return True


# The token ------------------------------------------------------------------------------------------------------------

def _token_file() -> Path | None:
    """Where Ray looks for the token after RAY_AUTH_TOKEN; None without a home."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        if not Path(named).is_absolute():
            raise InputError(f"RAY_AUTH_TOKEN_PATH={named}: should be an absolute path (Ray does not expand ~)")
        return Path(named)
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        return None


def _source() -> str:
    return "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(_token_file())


def _token() -> str | None:
    """The token that Ray would use, by its own rules; None where there is none."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token:
        path = _token_file()
        try:
            token = path.read_text(encoding="latin-1") if path else None
        except (FileNotFoundError, NotADirectoryError):
            token = None
        except OSError as error:
            raise InputError(f"{path}: Ray's token cannot be read: {error.strerror}") from None
        if token is None:
            return None
        if not os.environ.get("RAY_AUTH_TOKEN_PATH") and path.stat().st_mode & 0o077:
            with suppress(OSError):
                path.chmod(0o600)                   # Ray writes it with the umask; a file named by hand is left alone
    token = token.strip()
    if not token:
        raise InputError(f"{_source()}: should hold Ray's token, but is empty; remove it, or make a token with "
                         "ray get-auth-token --generate")
    if not (token.isascii() and token.isprintable()):
        raise InputError(f"{_source()}: should hold Ray's token, one line of plain characters, and nothing else")
    return token


def _make_token() -> None:
    """Make a token where Ray looks for it, unless another process was quicker; whole, and ours alone, at once."""
    token, path = secrets.token_hex(32), _token_file()
    try:
        if path is None:
            raise FileNotFoundError("no home")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".auth_token.", dir=path.parent)         # 0600, whatever the umask
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(token)
            with suppress(FileExistsError):
                os.link(name, path)                 # unlike a rename, never replaces one
        finally:
            Path(name).unlink()
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = token        # nowhere to keep it: for this run only


def _no_token(where: str, why: str) -> InputError:
    return InputError(f"{where}: {why}, and we have none: put it (ray get-auth-token on the head prints it) into "
                      f"{_token_file() or '~/.ray/auth_token'} or RAY_AUTH_TOKEN, or name its file with "
                      "RAY_AUTH_TOKEN_PATH")


# The cluster ----------------------------------------------------------------------------------------------------------

def _this_machines() -> tuple[str, str]:
    """Address of the cluster that ray start left running on this machine, and where it is written."""
    named = os.environ.get("RAY_ADDRESS")
    if named and named != "auto":
        return named, "RAY_ADDRESS"
    system = os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"
    path = Path(os.environ.get("RAY_TMPDIR", system)) / "ray" / "ray_current_cluster"
    try:
        owner, content = path.stat().st_uid, path.read_text()
    except FileNotFoundError:
        raise InputError(f"--address auto: no cluster of this machine is known (no RAY_ADDRESS, no {path}): give the "
                         "HOST:PORT that ray start --head printed") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--address auto: {path} cannot be read: {error}") from None
    if owner not in (0, os.getuid()):               # Ray makes its folder writable for all, and we would send our token
        raise InputError(f"--address auto: {path} is another user's: if that cluster ({content.strip()!r}) is meant, "
                         "give its HOST:PORT")
    return content.strip(), str(path)


def _parse(address: str, where: str) -> tuple[str, int]:
    if address.startswith("ray://"):
        raise InputError(f"{where}: a sweep cannot run through Ray Client (ray://): run the command on a node of the "
                         "cluster, with --address HOST:PORT as printed by ray start --head, or auto")
    match = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", address)
    if not match or not 0 < int(match[2]) < 65536:
        raise InputError(f"{where}: should be HOST:PORT, as printed by ray start --head, or auto, or local")
    return match[1], int(match[2])


def _connect(host: str, port: int) -> str:
    """Why no connection comes about, empty if one does. In a thread, for a silent name server knows no timeout."""
    outcome: SimpleQueue[str] = SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
        except (OSError, UnicodeError) as error:    # UnicodeError: names that no name server would take
            outcome.put(str(error) or type(error).__name__)
        else:
            outcome.put("")

    threading.Thread(target=connect, daemon=True).start()
    try:
        return outcome.get(timeout=SECONDS)
    except Empty:
        return f"no answer within {SECONDS:g} s"


def _ask(host: str, port: int, token: str | None) -> grpc.StatusCode:
    """What a head answers to the question for its name, with or without our token."""
    import grpc

    # dns:, for gRPC has schemes of its own for names such as unix; Ray, too, goes without a proxy.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"dns:///{host}:{port}", options=options) as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=SECONDS,
                                            metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK

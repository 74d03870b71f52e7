"""The speaker: ExaBGP beside the manager, and the manager's port to it.

`port` runs in the manager container; `launch` (with `keeper`, `relay` and `runner`) in the speaker
container. They share a unix socket in `names.SPEAKER_SOCKET_DIR` and the messages of `messages`.
"""

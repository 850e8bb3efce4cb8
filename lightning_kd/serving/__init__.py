"""A server for teachers: it answers other processes over HTTP."""

from lightning_kd.serving.command import serve
from lightning_kd.serving.http_server import TeacherServer
from lightning_kd.serving.limits import Limits
from lightning_kd.serving.service import TeacherService

__all__ = ["Limits", "TeacherServer", "TeacherService", "serve"]

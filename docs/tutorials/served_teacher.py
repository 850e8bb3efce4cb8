"""A teacher in another process, asked over HTTP."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd import ArithmeticData, ServedTeacher, SupervisedKD, arithmetic_tokenizer

TEACHER = "models/teacher"
torch.set_num_threads(1)


def make_config(width, spread):
    return LlamaConfig(
        vocab_size=14,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=spread,
    )


torch.manual_seed(0)
LlamaForCausalLM(make_config(64, spread=0.1)).save_pretrained(TEACHER)
arithmetic_tokenizer().save_pretrained(TEACHER)


def start_server(log, patience=300):
    line = [sys.executable, "-m", "lightning_kd", "serve", "--port", "0"]
    line += ["--teacher.name_or_path", TEACHER]
    with log.open("w") as out:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(line, env=one_thread, stdout=out, stderr=out)
    until = time.monotonic() + patience
    while not (found := re.search(r" at (http://\S+)", log.read_text())):
        if server.poll() is not None or time.monotonic() > until:
            stop_server(server)
            raise RuntimeError(f"no server came up: {log.read_text()}")
        time.sleep(0.2)
    return server, found[1]


def stop_server(server, patience=60):
    server.terminate()
    try:
        return server.wait(patience)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def train(teacher):
    L.seed_everything(0, verbose=False)
    student = LlamaForCausalLM(make_config(32, spread=0.02))
    module = SupervisedKD(student=student, teacher=teacher, alpha=0.0)
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=ArithmeticData())
    return trainer.callback_metrics["train/loss"].item(), student.state_dict()


local_loss, local = train(TEACHER)
server, url = start_server(Path("server.log"))
try:
    served_loss, served = train(ServedTeacher(url, timeout=30, retries=1))
finally:
    code = stop_server(server)
print(f"loss: {local_loss:.4f} with the teacher here, {served_loss:.4f} with the served one")
print("the same weights:", all(torch.equal(local[name], served[name]) for name in local))
print("the server has ended with", code)

# The same run once more, without a server.
try:
    train(ServedTeacher(url, timeout=2, retries=0))
except ValueError as error:
    print("without the server:", str(error).replace(url, "URL"))

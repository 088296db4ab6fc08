import numpy as np

from optserve.client import connect

rng = np.random.default_rng(0)
x = rng.standard_normal((256, 3)).astype(np.float32)
y = x @ np.array([2.0, -1.0, 0.5], np.float32) + 3.0

with connect("localhost:50051") as server:
    job = server.create_job(
        "line",
        {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)},
        optimizer="adam",
        lr=0.1,
        exist_ok=True,  # a second run goes on where the first one ended
    )
    with job.join() as worker:
        weights = worker.pull()
        for _ in range(300):
            error = x @ weights["w"] + weights["b"] - y
            gradients = {"w": x.T @ error / len(x), "b": error.mean(keepdims=True)}
            weights = worker.push_pull(gradients, metrics={"loss": float(np.square(error).mean())})
        print("step", worker.last_step.step, "w", weights["w"].round(3), "b", weights["b"].round(3))
    job.save_checkpoint(f"step-{worker.last_step.step}", overwrite=True)

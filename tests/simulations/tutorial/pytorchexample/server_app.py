"""A Flower / PyTorch app: the server."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import fedattack  # fedattack, 1 of 3
from pytorchexample.task import Net, partition

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    config = context.run_config
    lr: float = config["learning-rate"]

    global_model = Net()
    arrays = ArrayRecord(global_model.state_dict())

    strategy = FedAvg(fraction_evaluate=config["fraction-evaluate"])
    strategy = fedattack.eavesdrop(  # fedattack, 2 of 3
        strategy, model=Net, image_shape=(3, 32, 32), mean=0.5, std=0.5, learning_rate=lr,
        batch_size=config["batch-size"], local_epochs=config["local-epochs"], attack="ig", run_dir=config["run-dir"],
        truth=(lambda _, client: partition(config["images"], client, 4)[:2]) if config["score"] else None,
        settings={"ig.iterations": config["iterations"], "ig.restarts": 1}, victims=config["victims"],
    )  # fmt: skip

    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=config["num-server-rounds"],
    )

    print("Saving final model to disk...")
    torch.save(result.arrays.to_torch_state_dict(), f"{config['run-dir']}/final_model.pt")

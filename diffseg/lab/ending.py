"""The class of a run's kernels: one that ends at once after a cell that failed while processes loaded its images."""

import multiprocessing

from ipykernel.ipkernel import IPythonKernel


class Ending(IPythonKernel):
    def do_shutdown(self, restart: bool) -> dict:
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()  # else ipykernel waits half a minute for the end of one that has ended
        return super().do_shutdown(restart)

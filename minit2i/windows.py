"""Pictures larger than the prior's own grid: the prior draws in a window that is moved over them.

A plan is a list of windows (top, left, place); place (row, column) in the window is what it draws, None: all of it.

Shapes: B pictures, H W the large code grid, h w the prior's.
"""


def every_place(grid, window):
    """A window for each code in raster order, the code as near its middle as the borders allow.

    Taming, arXiv:2012.09841 sec. 3.3, fig. 3.
    """
    (big_h, big_w), (h, w) = grid, window
    plan = []
    for i in range(big_h):
        for j in range(big_w):
            top, left = min(max(i - h // 2, 0), big_h - h), min(max(j - w // 2, 0), big_w - w)
            plan.append((top, left, (i - top, j - left)))
    return plan


def centre_outward(grid, window, step=1):
    """Windows that overlap by half, those in the middle first; their corners are multiples of step.

    CogView's centre-continuous sliding window, arXiv:2105.13290 sec. 3.1.
    """

    def starts(n, size):
        stride = max(step, size // 2 // step * step)
        return [*range(0, n - size, stride), n - size]

    def distance(start):  # of the window's centre from the picture's, to which side last
        return sum((2 * s + n - m) ** 2 for s, n, m in zip(start, window, grid)), start

    corners = [(top, left) for top in starts(grid[0], window[0]) for left in starts(grid[1], window[1])]
    return [(*corner, None) for corner in sorted(corners, key=distance)]


def slide(draw, codes, window, plan, watch=None):
    """codes (B, H, W) with -1 where to draw -> all drawn; those known stay as they are.

    draw(part (B, h, w), k, top, left) -> part with its -1 drawn, in window k of the plan.
    watch(codes): called after each window.
    """
    codes, (h, w) = codes.clone(), window
    for k, (top, left, place) in enumerate(plan):
        part = codes[:, top : top + h, left : left + w]
        if place is not None:  # what comes later in raster order is not read, and need not be known
            row, column = place
            part = part.clamp_min(0)
            part[:, row, column] = codes[:, top + row, left + column]
        if (part < 0).any():
            drawn = draw(part, k, top, left)
            if place is None:
                codes[:, top : top + h, left : left + w] = drawn
            else:
                codes[:, top + row, left + column] = drawn[:, row, column]
        if watch:
            watch(codes)
    return codes

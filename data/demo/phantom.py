"""The anatomy of the demo patients: a contrast-enhanced upper abdomen in HU with its labels.

Everything is drawn in DICOM's patient coordinates, in mm from the middle of the volume: x towards
the patient's left, y towards the back, z towards the head. Later shapes cover earlier ones. `rng`
determines the patient: size, pose, organ shapes, enhancement and noise.
"""

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter

LABELS = {"liver": 1, "kidneys": 2, "spleen": 3, "lesion": 4}

AIR, LUNG, FAT, MUSCLE, BONE, MARROW = -1000, -840, -105, 58, 520, 210


class Canvas:
    """Voxels and labels of one patient, and the shapes to draw them with."""

    def __init__(self, rng, shape, spacing_mm):
        self.hu = np.full(shape, AIR, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        axes = [
            (np.arange(n, dtype=np.float32) - (n - 1) / 2) * s
            for n, s in zip(shape, spacing_mm, strict=True)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        roll, lean = rng.normal(0, 0.045), rng.normal(0, 0.03)  # radians, mm per mm
        dx, dy = rng.normal(0, 5), rng.normal(0, 5)
        cos, sin = float(np.cos(roll)), float(np.sin(roll))
        self.x = cos * (x - dx) + sin * (y - dy) + lean * z + self._waves(rng, axes, 3)
        self.y = cos * (y - dy) - sin * (x - dx) + self._waves(rng, axes, 3)
        self.z = z + self._waves(rng, axes, 4)

    @staticmethod
    def _waves(rng, axes, amplitude_mm):
        """Return a smooth displacement (products of sines): no organ is an exact ellipsoid."""
        total = 0
        for length_mm in (160, 110, 70):
            sines = [np.sin(a * 2 * np.pi / length_mm + rng.uniform(0, 6.28)) for a in axes]
            total = total + amplitude_mm * length_mm / 160 * np.einsum("x,y,z->xyz", *sines)
        return total.astype(np.float32)

    def blob(self, center, radii, power=2.0):
        """Return the distance from the centre relative to the radius: < 1 inside."""
        total = 0
        for axis, c, r in zip((self.x, self.y, self.z), center, radii, strict=True):
            if np.isfinite(r):  # an infinite radius makes a cylinder along this axis
                scaled = (axis - float(c)) / float(r)
                total = total + (scaled * scaled if power == 2 else np.abs(scaled) ** power)
        return np.sqrt(total) if power == 2 else total ** (1 / power)

    def tube(self, start, end):
        """Return the distance in mm from the segment between two points."""
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        d = end - start
        px, py, pz = self.x - start[0], self.y - start[1], self.z - start[2]
        t = np.clip((px * d[0] + py * d[1] + pz * d[2]) / (d @ d), 0, 1)
        return np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2 + (pz - t * d[2]) ** 2)

    def fill(self, where, hu, label=None):
        self.hu[where] = hu
        self.labels[where] = 0 if label is None else LABELS[label]


def make_phantom(rng, male, lesion, shape=(128, 128, 48), spacing_mm=(3.0, 3.0, 5.0)):
    """Draw one patient.

    rng: numpy Generator. male: more muscle and visceral fat, less fat under the skin. lesion: draw
    one to four tumours in the liver.
    Returns hu (X, Y, Z) int16 and labels (X, Y, Z) uint8 (see LABELS), with the axes of axial DICOM
    slices: x to the patient's left, y to the back, z to the head.
    """
    c = Canvas(rng, shape, spacing_mm)
    size = rng.normal(1.08, 0.05) * (1.03 if male else 0.96)
    c.x, c.y, c.z = c.x / size, c.y / size, c.z / size
    inside, wall, half = _body(c, rng, male)
    enhancement = rng.normal(1.0, 0.12)
    _gut(c, rng, inside)
    liver = _organs(c, rng, inside, enhancement)
    lungs = _chest(c, rng, inside, enhancement)
    _spine(c, rng)
    _ribs(c, rng, wall, half)
    _great_vessels(c, enhancement, lungs)
    if lesion:
        _lesions(c, rng, liver & (c.labels == LABELS["liver"]))
    _table(c, rng, shape, spacing_mm)
    voxels = gaussian_filter(c.hu, (0.55, 0.55, 0.3))  # partial volume
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), (0.6, 0.6, 0.2))
    voxels += noise * rng.uniform(10, 17) / float(noise.std())
    return np.clip(np.rint(voxels), -1024, 3071).astype(np.int16), c.labels


def _body(c, rng, male):
    """Draw skin, fat and muscle wall; return abdominal cavity, depth in the wall, its half axes."""
    under_skin = rng.uniform(10, 20) if male else rng.uniform(14, 28)
    muscle = 15 if male else 12
    half_x, half_y = 118 + rng.normal(0, 4), 80 + rng.normal(0, 4)
    waist = 1 - 0.05 * np.exp(-(((c.z + 40) / 50) ** 2))
    r = c.blob((0, 0, 0), (half_x, half_y, np.inf), 2.4) / waist
    depth = np.hypot(c.x, c.y) * (1 - 1 / np.maximum(r, 1e-3))  # mm outside the cavity
    skin = muscle + under_skin * (1 + 0.25 * c.y / half_y)
    c.fill(depth < skin + 3, 15)
    c.fill(depth < skin, FAT)
    wall = (depth < muscle) & (depth > 0)
    c.fill(depth < muscle, MUSCLE)
    c.fill(depth < 0, FAT)
    linea_alba = (np.abs(c.x) < 5) & (c.y < 0) & wall & (c.z < 40)
    c.fill(linea_alba, FAT)
    return depth < 0, np.where(wall, depth, np.nan), (half_x, half_y)


def _gut(c, rng, inside):
    """Draw small bowel, colon with stool and gas, and stomach."""
    for _ in range(30):
        center = (rng.uniform(-70, 72), rng.uniform(-60, 5), rng.uniform(-125, -15))
        r = np.where(inside, c.blob(center, rng.uniform((14, 11, 12), (26, 17, 22))), 9)
        c.fill(r < 1, rng.normal(75, 12))
        c.fill(r < 0.8, rng.normal(25, 12))
    texture = gaussian_filter(rng.standard_normal(c.hu.shape, np.float32), 1.0)
    for x, y, bottom, top, radius in ((-92, 22, -130, -35, 21), (98, 28, -130, 20, 15)):
        haustra = 1 + 0.15 * np.sin(c.z / 6 + rng.uniform(0, 6))
        r = np.hypot(c.x - x, c.y - y) / (radius * haustra)
        _stool(c, texture, np.where((c.z > bottom) & (c.z < top) & inside, r, 9))
    level = rng.normal(-28, 6)
    r = np.hypot(c.y + 56, c.z - level + 12 * np.cos(c.x / 45)) / 17
    _stool(c, texture, np.where((np.abs(c.x) < 92) & inside, r, 9))
    stomach = np.where(inside, c.blob((52, -22, 38), (44, 42, 46)), 9)
    c.fill(stomach < 1, 80)
    c.fill(stomach < 0.88, 18)
    c.fill((stomach < 0.86) & (c.y < rng.uniform(-50, -36)), AIR + 30)


def _stool(c, texture, r):
    """Fill a piece of colon, given the distance from its middle relative to its radius."""
    c.fill(r < 1, 60)
    content = r < 0.82
    c.hu[content] = 10 + 500 * np.minimum(texture[content], 0.05)
    c.fill(content & (r < 0.7) & (c.y < np.quantile(c.y[content], 0.25)), AIR + 60)


def _organs(c, rng, inside, enhancement):
    """Draw kidneys, spleen, pancreas, psoas, gallbladder and liver; return the liver."""
    kidneys = np.zeros(c.labels.shape, bool)  # with the fat at their hilum
    for side in (-1, 1):  # the right kidney (negative x) lies lower
        psoas = c.blob((side * 38, 44, -110), (21, 21, 95))
        c.fill((psoas < 1) & inside, MUSCLE)
        cx, cz = side * rng.normal(62, 3), rng.normal(-28 if side > 0 else -42, 6)
        kx, kz = c.x - cx, c.z - cz
        leaning = kx + side * 0.18 * kz  # upper poles lean towards the spine
        radii = rng.normal((29, 26, 56), (1.5, 1.5, 3))
        parts = ((leaning, radii[0]), (c.y - 36, radii[1]), (kz, radii[2]))
        r = np.sqrt(sum((a / b) ** 2 for a, b in parts))
        hilum = np.sqrt(((leaning + side * 17) / 15) ** 2 + ((c.y - 32) / 11) ** 2 + (kz / 26) ** 2)
        kidneys |= r < 1
        kidney = (r < 1) & (hilum > 1) & inside
        c.fill(kidney, 195 * enhancement, "kidneys")
        c.hu[kidney & (r < 0.66)] = 150 * enhancement
        c.fill((hilum < 1) & (r < 1), -60)
        c.fill((hilum < 0.45) & (r < 1.1), 20)
    spleen = c.blob((88, 26, 42), rng.normal((34, 46, 50), 3))
    hollow = c.blob((60, 4, 40), (44, 42, 60))
    c.fill((spleen < 1) & (hollow > 1) & inside, 125 * enhancement, "spleen")
    for start, end in (((-26, -12, -22), (6, -18, -6)), ((6, -18, -6), (62, 14, 22))):
        c.fill(c.tube(start, end) < 10, 92 * enhancement)
    right = c.blob((-56, -2, 30), rng.normal((68, 84, 88), 3), 2.3)
    left = c.blob((12, -44, 52), rng.normal((66, 34, 42), 4))
    underside = c.z > -42 + 0.55 * (c.x + 56) - 0.25 * c.y
    liver = ((right < 1) & (underside | (c.x < -75)) | (left < 1)) & inside
    liver &= ~kidneys & (c.z > -85)
    bile = c.blob((-44, -38, -14), (15, 20, 22))
    base = rng.normal(104, 9) * enhancement
    c.fill(liver, base, "liver")
    c.fill(bile < 1.1, base)
    c.fill(bile < 1, 8)
    hilum = (-22, 8, 62)
    for _ in range(7):  # hepatic and portal veins
        end = (rng.uniform(-105, 20), rng.uniform(-55, 40), rng.uniform(-10, 85))
        vein = (c.tube(hilum, end) < rng.uniform(2.5, 4.5)) & (c.labels == LABELS["liver"])
        c.hu[vein] = base + 45
    return liver


def _chest(c, rng, inside, enhancement):
    """Draw the lungs above the diaphragm's domes and the heart between them; return the lungs."""
    top = rng.normal(88, 7)
    lungs = np.zeros_like(inside)
    for side, height in ((-1, top), (1, top - 10)):
        bend = ((c.x - side * 58) / 68) ** 2 + ((c.y + 8) / 78) ** 2
        above = c.z > height - 52 * bend
        lungs |= above & (side * c.x > 0)
    lungs &= inside
    middle = (c.blob((6, 10, 0), (30, 70, np.inf)) < 1) & lungs
    heart = (c.blob((22, -26, top + 42), (62, 48, 44)) < 1) & lungs
    cut = lungs & ~middle & ~heart
    c.fill(lungs, 45)
    c.fill(middle, -60)
    c.fill(cut, LUNG)
    texture = gaussian_filter(rng.standard_normal(c.hu.shape, np.float32), (0.8, 0.8, 1.5))
    c.hu[cut] += 900 * np.maximum(texture[cut] - 0.38, 0) + 40 * texture[cut]
    c.fill(heart, 70)
    c.fill((c.blob((22, -26, top + 42), (52, 38, 36)) < 1) & lungs, 150 * enhancement)
    return lungs


def _spine(c, rng):
    """Draw vertebrae and discs, canal, processes, and the muscles beside them."""
    for side in (-1, 1):
        c.fill(c.blob((side * 32, 76, 0), (29, 19, np.inf), 2.5) < 1, MUSCLE)
    level = np.abs((c.z + rng.uniform(0, 32)) % 32 - 16)  # 16: the middle of a disc
    curve = 5 * np.cos((c.z + 60) / 45)  # lordosis
    body = np.sqrt((c.x / 23) ** 2 + ((c.y - 40 + curve) / 18) ** 2)
    c.fill(body < 1, np.where(level > 13, 85, np.where(body > 0.86, 400, MARROW))[body < 1])
    y = c.y - 40 + curve
    arch = np.sqrt((c.x / 16) ** 2 + ((y - 26) / 14) ** 2)
    c.fill((arch < 1) & (level < 10), 420)
    c.fill((np.abs(c.x) < 4) & (y > 32) & (y < 56) & (level < 9), BONE)
    c.fill((np.abs(c.x) < 44) & (np.abs(y - 25) < 4) & (level < 5), 380)
    c.fill(np.hypot(c.x, y - 26) < 9, 25)


def _ribs(c, rng, wall, half):
    """Draw ribs slanting down from the spine, costal cartilage in front, and the iliac wings."""
    angle = np.arctan2(np.abs(c.x) / half[0], c.y / half[1])  # 0 at the back, pi in front
    offset = rng.uniform(-8, 8)
    for number in range(8):
        reach = 3.0 if number > 1 else 1.3 + 0.5 * number
        height = -42 + offset + 27 * number + 46 * (1 - angle / 1.6) * (angle < 2.2)
        height = height + np.where(angle >= 2.2, 22 * (angle - 2.2) - 17, 0)
        depth = np.abs(wall - 6.0)
        across = np.hypot((c.z - height) / 7.0, depth / 4.5)
        rib = (across < 1) & (angle > 0.35) & (angle < reach)
        c.fill(rib, np.where(angle > 2.1, 130, np.where(across > 0.6, BONE, 260))[rib])
    for side in (-1, 1):
        r = c.blob((side * 62, 8, -128), (58, 66, 52))
        wing = (np.abs(r - 1) < 0.07) & (side * c.x > 52) & (c.y > 5) & np.isfinite(c.hu)
        c.fill(wing & (c.hu > -500), BONE)


def _great_vessels(c, enhancement, lungs):
    c.fill((np.hypot(c.x - 10, c.y - 10) < 11) & (c.z < 60), 165 * enhancement)
    c.fill((np.hypot(c.x - 16, c.y - 24) < 12) & (c.z >= 60), 165 * enhancement)
    vena_cava = np.hypot((c.x + 22) / 13, (c.y - 10) / 10) < 1
    c.fill(vena_cava & (c.z < 75), 130 * enhancement)


def _lesions(c, rng, liver):
    """Draw one to four tumours, 9-23 mm in radius, full of iodised oil (chemoembolisation), which
    is denser than any bone."""
    candidates = np.argwhere(binary_erosion(liver, iterations=2))
    for _ in range(rng.integers(1, 5)):
        i = tuple(candidates[rng.integers(len(candidates))])
        radii = rng.uniform(10, 20) * rng.uniform(0.85, 1.15, 3)
        r = c.blob((c.x[i], c.y[i], c.z[i]), radii)
        where = (r < 1) & liver
        c.fill(where, (rng.uniform(900, 1300) * (1 - 0.35 * r**2))[where], "lesion")


def _table(c, rng, shape, spacing_mm):
    """Draw the scanner's table: a curved shell under the back, wherever there is still air."""
    x = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing_mm[0]
    y = (np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing_mm[1]
    body = (c.hu > -900).any(axis=(0, 2))
    low = y[np.flatnonzero(body)[-1]] + 5
    surface = y[None, :] - (low - (x[:, None] / 190) ** 2 * 38)
    shell = (np.abs(surface - 3) < 3) & (np.abs(x[:, None]) < 185)
    c.hu[shell[:, :, None] & (c.hu < -900)] = -350 + rng.normal(0, 20)

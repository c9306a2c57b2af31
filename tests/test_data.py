"""Images, trees and packed sets, and the stream of a training run."""
import itertools
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import svg
from lib import data, shapes
from tests.helpers import REAL_DATA, Case, ok, run, write_pictures


class Data(Case):
    def test_images_of_every_mode_decode_to_upright_rgb(self):
        y, x = np.mgrid[:40, :60].astype(np.float32)
        rgb = Image.fromarray(np.stack([x / 59 * 255, y / 39 * 255, 0 * x + 90], -1).astype(np.uint8))
        grey = np.asarray(rgb.convert("L"))
        half = np.full((40, 60), 130, np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        for name, stored, colour, settings in (
                ("L.png", rgb.convert("L"), False, {}), ("P.png", rgb.quantize(256), True, {}),
                ("CMYK.tif", rgb.convert("CMYK"), True, {}),
                ("CMYK.jpg", rgb.convert("CMYK"), True, {"quality": 98}),
                ("RGBA.png", Image.merge("RGBA", [*rgb.split(), Image.fromarray(half)]), True, {}),
                ("LA.png", Image.merge("LA", [rgb.convert("L"), Image.fromarray(half)]), False, {}),
                ("I16.png", Image.fromarray(grey.astype(np.uint16) * 257), False, {}),
                ("turned.jpg", rgb.rotate(90, expand=True), True, {"exif": exif, "quality": 98})):
            with self.subTest(name):
                stored.save(name, **settings)
                image = data.open_rgb(name)
                expected = np.asarray(rgb) if colour else np.repeat(grey[..., None], 3, 2)
                self.assertEqual((image.mode, image.size), ("RGB", (60, 40)))
                self.assertLess(np.abs(np.asarray(image) - expected.astype(int)).mean(), 4)

    def test_adm_crop_is_a_box_average_and_central(self):
        rng = np.random.default_rng(0)
        big = rng.integers(0, 256, (128, 192, 3), np.uint8)  # halved twice to 32 x 48
        small = big.astype(int)
        for _ in range(2):  # Pillow rounds after each axis
            small = (small[:, ::2] + small[:, 1::2] + 1) // 2
            small = (small[::2] + small[1::2] + 1) // 2
        np.testing.assert_array_equal(data.crop(Image.fromarray(big), 32), small[:, 8:40])
        tall = rng.integers(0, 256, (45, 32, 3), np.uint8)  # fits as it is: the centre, rounded down
        np.testing.assert_array_equal(data.crop(Image.fromarray(tall), 32), tall[6:38])
        for size in ((33, 47), (640, 70), (20, 20), (63, 64)):
            self.assertEqual(data.crop(Image.new("RGB", size), 32).shape, (32, 32, 3))
        crops = [data.crop(Image.fromarray(tall), 32, np.random.default_rng(i)).tobytes() for i in range(200)]
        self.assertEqual(set(crops), {tall[i:i + 32].tobytes() for i in range(14)})

    def test_stream_visits_each_image_once_per_epoch_in_new_order(self):
        flat = [item for batch, _ in zip(data.stream(10, 4, 0, 0), range(10)) for item in batch]
        self.assertEqual([p for _, p in flat], list(range(40)))
        epochs = [[i for i, _ in flat[n:n + 10]] for n in range(0, 40, 10)]
        self.assertTrue(all(sorted(e) == list(range(10)) for e in epochs))
        self.assertEqual(len(set(map(tuple, epochs))), 4)
        self.assertNotEqual(flat[:10], next(data.stream(10, 10, 1, 0)))
        self.assertEqual(next(data.stream(10, 4, 0, 7)), flat[28:32])  # a restart

    def test_ranks_share_the_batch_of_one_process(self):
        shares = []
        for rank in range(2):
            with mock.patch.multiple("lib.runs", rank=lambda rank=rank: rank, world_size=lambda: 2):
                shares += next(data.stream(100, 8, 0, 13))
        self.assertEqual(shares, next(data.stream(100, 8, 0, 13)))

    def test_hidden_and_empty_folders_are_no_classes_and_loose_images_are_named(self):
        for path in ("a/0.png", "b/deeper/1.png", ".ipynb_checkpoints/2.png", "b/.cache/3.png", "b/._4.png"):
            Path("tree", path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(Path("tree", path))
        Path("tree/empty").mkdir()
        dataset = data.open_data("tree", 32)
        self.assertEqual((dataset.classes, [dataset.name(i) for i in range(2)], len(dataset)),
                         (["a", "b"], ["tree/a/0.png", "tree/b/deeper/1.png"], 2))
        Image.new("RGB", (32, 32)).save("tree/loose.png")
        with self.assertWarnsRegex(UserWarning, "1 images beside the class folders.*loose.png"):
            self.assertEqual(len(data.open_data("tree", 32)), 2)
        self.assertEqual(data.list_images("tree"),
                         ["tree/a/0.png", "tree/b/deeper/1.png", "tree/loose.png"])

    def test_labels_and_images_are_in_the_order_of_the_classes(self):
        for name in ("a-b", "a", "B"):  # as paths "a-b/x" comes before "a/x"
            write_pictures(f"tree/{name}", 2)
        dataset = data.open_data("tree", 32)
        self.assertEqual((dataset.classes, dataset.labels.tolist()), (["B", "a", "a-b"], [0, 0, 1, 1, 2, 2]))
        self.assertEqual([os.fsdecode(name) for name in dataset.names],
                         ["B/0.png", "B/1.png", "a/0.png", "a/1.png", "a-b/0.png", "a-b/1.png"])

    def test_a_flat_folder_trains_both_stages_as_one_class(self):
        write_pictures("photos", 4)
        ok(f"train_ae {REAL_DATA} --data photos --steps 1")
        ok("train_dit --batch 4 --workers 0 --model 1,32,2 --data photos --steps 1 --preview-steps 1")
        sit = svg.load_sit("runs/dit/last.pt")
        self.assertEqual((sit.num_classes, sit.meta["classes"]), (1, ["photos"]))
        ok("sample --steps 1 --num 2 --guidance 1")


class PackedData(Case):
    def setUp(self):
        super().setUp()
        for name in ("a", "b"):
            Path("tree", name, "deeper").mkdir(parents=True)
            for i in range(6):
                picture = Image.fromarray(shapes.draw(i, np.random.default_rng(i), 48)[0])
                picture.resize((48, 60)).save(f"tree/{name}/{'deeper/' * (i % 2)}{i}.jpg")

    def test_packed_pixels_are_those_of_the_tree_and_corrupt_images_are_left_out(self):
        Path("tree/a/4.jpg").write_bytes(b"no picture")
        code, out, err = run("data pack tree/ packed/ --size 32 --workers 2")
        self.assertEqual((code, err), (0, "warning: tree/a/4.jpg: not a readable image, left out\n"))
        self.assertIn("11 images in packed, 1 corrupt", out)
        self.assertEqual(sorted(os.listdir("packed")), ["classes.json", "images.npy", "labels.npy"])
        os.remove("tree/a/4.jpg")
        tree, packed = data.open_data("tree", 32), data.open_data("packed", 32)
        self.assertIsInstance(packed, data.Packed)
        self.assertEqual((len(packed), packed.classes), (len(tree), tree.classes))
        for i in range(len(tree)):
            (a, *label), (b, *also) = tree[i, 0], packed[i, 0]
            np.testing.assert_array_equal(a, b)
            self.assertEqual(label, also)
        self.assertEqual(data.dataset_identity(tree), data.dataset_identity(packed))
        random = data.open_data("tree", 32, random_crop=True)
        self.assertNotEqual(data.dataset_identity(random), data.dataset_identity(packed))
        self.assertLess(len(pickle.dumps(packed)), 1000)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).images, packed.images)
        for name, workers in (("tree", 0), ("packed", 1)):
            ok(f"train_dit --ae {shapes.DEMO_PT} --model 1,32,2 --batch 4 --steps 2 --preview-steps 1",
               "--workers", workers, "--data", name, "--name", name)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("tree", "packed")))

    def test_an_interrupted_packing_leaves_nothing_and_the_result_appears_whole(self):
        real, opened = data.open_rgb, itertools.count()

        def interrupted(path):
            if next(opened) == 9:
                self.assertFalse(os.path.exists("packed"))
                raise KeyboardInterrupt
            return real(path)

        with mock.patch("lib.data.open_rgb", interrupted):
            self.assertEqual(run("data pack tree packed --size 16 --workers 0")[0], 130)
        self.assertEqual(os.listdir(), ["tree"])
        ok("data pack tree packed --size 16 --workers 0")
        self.assertEqual(sorted(os.listdir()), ["packed", "tree"])

    def test_a_damaged_or_wrong_packed_set_is_refused(self):
        ok("data pack tree packed --size 32 --workers 0")
        other_size = REAL_DATA.replace("--image-size 32 --grid 4", "--image-size 64 --grid 8")
        self.refuse_all([
            ("data pack tree packed", "packed already exists"),
            ("data pack nowhere new", "nowhere: no such folder"),
            (f"train_ae {other_size} --data packed --steps 1", "packed at 32 pixels, needed at 64")])
        whole = Path("packed/images.npy").read_bytes()
        for damaged in (whole[:200], whole[:50], b""):
            Path("packed/images.npy").write_bytes(damaged)
            self.refused(f"train_ae {REAL_DATA} --data packed --steps 1", "packed: not a whole packed set")

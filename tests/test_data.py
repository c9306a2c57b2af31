"""Images, trees and packed sets, and the stream of a training run."""
import itertools
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image, ImageCms

import svg
from lib import data, files, shapes
from tests.helpers import REAL_DATA, Case, ok, run, write_pictures


class Data(Case):
    def test_images_of_every_mode_decode_to_upright_rgb(self):
        y, x = np.mgrid[:40, :60].astype(np.float32)
        rgb = Image.fromarray(np.stack([x / 59 * 255, y / 39 * 255, 0 * x + 90], -1).astype(np.uint8))
        grey, half, turned = rgb.convert("L"), Image.new("L", rgb.size, 130), rgb.rotate(90, expand=True)
        turned.getexif()[0x0112] = 6  # shown turned by 90 degrees clockwise
        paper = [Image.blend(Image.new(x.mode, x.size, "white"), x, 130 / 255) for x in (rgb, grey)]
        values = np.asarray(grey, np.float32)
        stretched = Image.fromarray((values / values.max() * 255).astype(np.uint8))
        for name, stored, expected in (
                ("L.png", grey, grey), ("P.png", rgb.quantize(256), rgb), ("turned.jpg", turned, rgb),
                ("12 bits.png", Image.fromarray((values * 16).astype(np.uint16)), grey),
                ("F.tif", Image.fromarray(values / 255), grey),
                ("I.tif", Image.fromarray(values.astype(np.int32) * 1000), stretched),
                ("CMYK.tif", rgb.convert("CMYK"), rgb), ("CMYK.jpg", rgb.convert("CMYK"), rgb),
                ("RGBA.png", Image.merge("RGBA", [*rgb.split(), half]), paper[0]),
                ("LA.png", Image.merge("LA", [grey, half]), paper[1]),
                ("I16.png", Image.fromarray(np.asarray(grey, np.uint16) * 257), grey)):
            with self.subTest(name):
                stored.save(name, exif=stored.getexif())
                image = data.open_rgb(name)
                self.assertEqual((image.mode, image.size), ("RGB", (60, 40)))
                difference = np.asarray(image) - np.asarray(expected.convert("RGB"), int)
                self.assertLess(np.abs(difference).mean(), 4)
        for values, expected in ((np.uint16([[0, 25700]]), [0, 100]), (np.uint16([[0, 2730]]), [0, 170]),
                                 (np.float32([[0.4, -0.5]]), [153, 0]), (np.uint16([[0, 0]]), [0, 0])):
            Image.fromarray(values).save("x.tif")
            self.assertEqual(np.asarray(data.open_rgb("x.tif"))[0, :, 0].tolist(), expected)
        Image.fromarray(np.float32([[0, np.nan]])).save("x.tif")
        with self.assertRaisesRegex(files.UserError, "x.tif: not a readable image .*NaN"):
            data.open_rgb("x.tif")

    def test_what_stands_beside_the_pixels_is_heeded_and_does_not_spoil_them(self):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
        # Turned by 90 degrees, and a tag that cannot be written again.
        odd = b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\1\7\0\1\0\0\0\1\2\3\4" + bytes(4)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        other = profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
        for a, b in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"?XYZ", b"gXYZ")):  # its red is green
            other = other.replace(a, b)
        for beside, expected in (
                ({"exif": odd}, np.rot90(pixels, -1)), ({"exif": b"Exif\0\0no TIFF"}, pixels),
                ({"icc_profile": profile}, pixels), ({"icc_profile": other}, pixels[..., [1, 0, 2]]),
                ({"icc_profile": bytes(2**21)}, pixels)):
            with self.subTest(beside=str(beside)[:40]):
                Image.fromarray(pixels).save("x.png", **beside)
                difference = np.asarray(data.open_rgb("x.png")).astype(int) - expected
                self.assertLessEqual(np.abs(difference).max(), 2)

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

    def test_stream_visits_each_image_once_per_epoch_in_new_order_and_ranks_share_its_batches(self):
        flat = [item for batch, _ in zip(data.stream(10, 4, 0, 0), range(10)) for item in batch]
        self.assertEqual([p for _, p in flat], list(range(40)))
        epochs = [[i for i, _ in flat[n:n + 10]] for n in range(0, 40, 10)]
        self.assertEqual([sorted(epoch) for epoch in epochs], [list(range(10))] * 4)
        self.assertEqual(len(set(map(tuple, epochs))), 4)
        self.assertNotEqual(flat[:10], next(data.stream(10, 10, 1, 0)))
        self.assertEqual(next(data.stream(10, 4, 0, 7)), flat[28:32])  # a restart, at the end of an epoch
        shares = []
        for rank in range(2):
            with mock.patch.multiple("lib.runs", rank=lambda rank=rank: rank, world_size=lambda: 2):
                shares += next(data.stream(10, 4, 0, 7))
        self.assertEqual(shares, flat[28:32])

    def test_classes_are_folders_in_order_but_hidden_and_empty_ones_and_loose_images_are_named(self):
        shown = ["B/0.png", "a/0.png", "a/deeper/1.png", "a-b/0.png"]  # as paths "a-b/0" comes before "a/0"
        for path in (*shown, "loose.png", ".ipynb_checkpoints/2.png", "a/.cache/3.png", "a/._4.png"):
            Path("tree", path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(Path("tree", path))
        Path("tree/empty").mkdir()
        with self.assertWarnsRegex(UserWarning, "1 images beside the class folders.*loose.png"):
            dataset = data.open_data("tree", 32)
        self.assertEqual((dataset.classes, dataset.labels.tolist()), (["B", "a", "a-b"], [0, 1, 1, 2]))
        self.assertEqual([dataset.name(i) for i in range(len(dataset))], [f"tree/{path}" for path in shown])
        self.assertEqual(data.list_images("tree"), [f"tree/{path}" for path in (*shown, "loose.png")])
        os.symlink(".", "tree/latest")  # and others in a circle
        os.symlink("..", "tree/a/up")
        os.symlink("../a-b", "tree/B/other")  # does not take the class's images
        Path("tree/a/dataset.json").touch()
        os.rename("tree/B/0.png", "tree/B/0.JFIF")
        with self.assertWarnsRegex(UserWarning, "tree: 4 files .* left out, such as tree/B/other"):
            self.assertEqual(len(data.list_images("tree")), 5)
            self.assertEqual(data.open_data("tree", 32).classes, ["B", "a", "a-b"])
        with mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied", "tree/a")):
            self.refused(f"train_ae {REAL_DATA} --data tree --steps 1", "tree/a: Permission denied")

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
        self.assertEqual(sorted(os.listdir("packed")),
                         ["classes.json", "images.npy", "labels.npy", "names.npy"])
        os.remove("tree/a/4.jpg")
        tree, packed = data.open_data("tree", 32), data.open_data("packed", 32)
        self.assertIsInstance(packed, data.Packed)
        self.assertEqual((len(packed), packed.classes), (len(tree), tree.classes))
        for i in range(len(tree)):
            (a, *label), (b, *also) = tree[i, 0], packed[i, 0]
            np.testing.assert_array_equal(a, b)
            self.assertEqual(label, also)
        self.assertEqual(data.dataset_identity(tree), data.dataset_identity(packed))
        os.rename("tree/b/0.jpg", "tree/b/00.jpg")
        self.assertNotEqual(data.dataset_identity(data.open_data("tree", 32)), data.dataset_identity(packed))
        os.rename("tree/b/00.jpg", "tree/b/0.jpg")
        random = data.open_data("tree", 32, random_crop=True)
        self.assertNotEqual(data.dataset_identity(random), data.dataset_identity(packed))
        self.assertLess(len(pickle.dumps(packed)), 1000)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).images, packed.images)
        for name, workers in (("tree", 0), ("packed", 1)):
            ok(f"train_dit --ae {shapes.DEMO_PT} --model 1,32,2 --batch 4 --steps 2 --preview-steps 1",
               "--workers", workers, "--data", name, "--name", name)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("tree", "packed")))

    def test_a_packed_set_appears_whole_or_not_at_all_and_one_of_another_size_or_damaged_is_refused(self):
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
        self.refused("data pack nowhere new", "nowhere: no such folder")
        self.refused(f"train_ae {REAL_DATA} --data packed --steps 1", "packed at 16 pixels, needed at 32")
        whole = Path("packed/images.npy").read_bytes()
        for damaged in (whole[:200], whole[:50], b""):
            Path("packed/images.npy").write_bytes(damaged)
            self.refused(f"train_ae {REAL_DATA} --data packed --steps 1", "packed: not a whole packed set")

"""Watch a camera, a video or a folder of images through a CARSO service.

    carso serve &
    python examples/webcam.py                      # the first camera; this and a video need carso[video]
    python examples/webcam.py clip.mp4 --invert    # a video of dark digits on white paper
    python examples/webcam.py docs/samples         # a folder needs no OpenCV

Every frame gets the fast answer at once, and those that the policy chooses are voted on too. Where the two paths
disagree, the frame may have been manipulated. A camera's frames are taken as fast as the service takes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from carso import CarsoError, Client, FastFrame, Frame, FrameError, RobustFrame

SIDE = 224  # pixels that are sent; the service scales them to what its bundle takes


def frames_of(source: str) -> Iterator[Frame]:
    """Return the frames of a folder, a video file, or the camera of that number. Exits if there are none."""
    if Path(source).is_dir():
        return (Frame(file, id=file.name) for file in sorted(Path(source).iterdir()) if file.is_file())
    try:
        import cv2
    except ImportError:
        sys.exit("a camera or a video needs OpenCV: pip install 'carso[video]' (a folder of images does not)")
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        sys.exit(f"{source} is neither a folder, nor a video that OpenCV reads, nor the number of a camera")

    def middles() -> Iterator[Frame]:
        number = 0
        while (read := capture.read())[0]:
            height, width, _ = read[1].shape
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = cv2.resize(
                read[1][top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA
            )
            yield Frame(cv2.imencode(".png", square)[1].tobytes(), id=number)
            number += 1

    return middles()


def main() -> None:
    """Print a line for each answer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="?", default="0", help="a folder, a video, or a camera's number (default: 0)")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="chance that a frame is voted on (default: %(default)s)"
    )
    parser.add_argument("--margin", type=float, default=0.3, help="vote on frames whose two best classes are so near")
    parser.add_argument("--invert", action="store_true", help="for dark ink on white paper, with the shipped bundle")
    parser.add_argument("--url", help="of the service (default: CARSO_URL, or http://127.0.0.1:8000)")
    asked = parser.parse_args()
    with Client(asked.url) as client:
        answers = client.stream(
            frames_of(asked.source), rate=asked.rate, margin=asked.margin, invert=asked.invert, resize=True
        )
        for answer in answers:
            match answer:
                case FastFrame(prediction=seen):
                    print(f"{answer.id}: {seen.class_name}", flush=True)
                case RobustFrame(prediction=voted) if voted.agree is False:
                    print(f"{answer.id}: {voted.class_name} by vote: may have been manipulated", flush=True)
                case RobustFrame(prediction=voted):
                    print(f"{answer.id}: {voted.class_name} by vote too", flush=True)
                case FrameError():
                    print(f"{answer.id}: {answer.message}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (CarsoError, OSError) as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        pass

package main

import (
	"os"

	"csi-qcow2/internal/imagefile"
)

// maxImgChain bounds how far down reads looks.
const maxImgChain = 200

// reads reports whether the image name has its bytes in the host file of target,
// or a backing file below it has: target must not be emptied then. What cannot be
// opened reads nothing.
func (c *imgContext) reads(name, format, target string) bool {
	for range maxImgChain {
		if sameFile(name, target) {
			return true
		}
		info, err := c.imageInfo(name, format, true)
		if err != nil || info.qcow2 == nil || info.fullBacking == "" {
			return false
		}
		name, format = info.fullBacking, info.qcow2.BackingFormat
	}
	return false
}

// sameFile reports whether two image names mean one host file, by whatever names.
func sameFile(a, b string) bool {
	pathA, pathB := imagefile.HostPath(a), imagefile.HostPath(b)
	if pathA == "" || pathB == "" {
		return false
	}
	stA, errA := os.Stat(pathA)
	stB, errB := os.Stat(pathB)
	return errA == nil && errB == nil && os.SameFile(stA, stB)
}

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// deviceOf returns the block device of a mounted filesystem or of a block
// device node, and what the device stands on, in words.
func deviceOf(path string) (device, stands string, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	number := st.Dev
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		number = st.Rdev
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number)))
	if err != nil {
		return "", "", err
	}
	name := filepath.Base(link)
	if _, err := os.Stat("/sys/block/" + name + "/loop/backing_file"); err == nil {
		return "/dev/" + name, "a loop device on a file that the agent serves by FUSE", nil
	}
	if _, err := os.Stat("/sys/block/" + name + "/pid"); err == nil && strings.HasPrefix(name, "nbd") {
		return "/dev/" + name, "the kernel's nbd, connected to the agent", nil
	}
	return "/dev/" + name, "", nil
}

// capacity returns the size of the filesystem mounted at path, in bytes, and
// what an unprivileged user may still write to it.
func capacity(path string) (total, available int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

// mayResizeExt4 reports whether the kernel lets this process, and so the agent
// that it starts, grow a mounted ext4. Some virtual machines do not.
func mayResizeExt4() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// onHost returns how many bytes of the host a file takes.
func onHost(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

// chain returns the files of an image's backing chain, as QEMU follows it.
func (s stage) chain(ctx context.Context, image string) ([]string, error) {
	out, err := output(ctx, "qemu-img", "info", "--force-share", "--backing-chain", "--output=json", image)
	if err != nil {
		return nil, err
	}
	var levels []struct {
		Filename string `json:"filename"`
	}
	if err := json.Unmarshal(out, &levels); err != nil {
		return nil, fmt.Errorf("qemu-img info %q: %w", image, err)
	}
	var files []string
	for _, level := range levels {
		if file := innermost(level.Filename); len(files) == 0 || files[len(files)-1] != file {
			files = append(files, file)
		}
	}
	return files, nil
}

// innermost returns the host file that a name of QEMU's stands on: the name
// itself, or the deepest "filename" of a json: name.
func innermost(name string) string {
	text, ok := strings.CutPrefix(name, "json:")
	if !ok {
		return name
	}
	var options map[string]any
	if json.Unmarshal([]byte(text), &options) != nil {
		return name
	}
	for {
		if file, ok := options["filename"].(string); ok {
			return file
		}
		next, ok := options["file"].(map[string]any)
		if !ok {
			return name
		}
		options = next
	}
}

// images returns every qcow2 file of the pool.
func (s stage) images() ([]string, error) {
	var images []string
	err := filepath.WalkDir(s.pool(), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.HasSuffix(path, ".qcow2") {
			images = append(images, path)
		}
		return err
	})
	return images, err
}

// poolContent returns what lies in the pool below its directories of volumes
// and of creations in progress: nothing, if it is empty.
func (s stage) poolContent() ([]string, error) {
	var found []string
	for _, dir := range []string{"volumes", "incoming"} {
		entries, err := os.ReadDir(s.path("pool", dir))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	return found, nil
}

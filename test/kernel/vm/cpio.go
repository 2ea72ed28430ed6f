package vm

import (
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
)

// cpioWriter writes a "newc" archive, which the kernel unpacks as its first root file system.
// A member is a header of 110 bytes, the name with a NUL, and the content, each padded to 4 bytes:
//
//	Offset  Size  Field       Meaning
//	     0     6  magic       "070701"
//	     6     8  ino         all fields are 8 hexadecimal digits
//	    14     8  mode        type and permissions
//	    22     8  uid
//	    30     8  gid
//	    38     8  nlink
//	    46     8  mtime
//	    54     8  filesize    bytes of content
//	    62    32  dev, rdev   major and minor of each
//	    94     8  namesize    bytes of the name, with its NUL
//	   102     8  check       0
//
// Spec: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
type cpioWriter struct {
	w    io.Writer
	ino  int
	n    int64    // bytes written
	dirs []string // directories written
	err  error    // first error; nothing is written after it
}

func (c *cpioWriter) member(name string, mode uint32, size int64, content io.Reader) {
	c.ino++
	header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", c.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0)
	c.copy(strings.NewReader(header + name + "\x00"))
	c.pad()
	c.copy(io.LimitReader(content, size))
	c.pad()
}

func (c *cpioWriter) copy(r io.Reader) {
	if c.err != nil {
		return
	}
	n, err := io.Copy(c.w, r)
	c.n += n
	c.err = err
}

func (c *cpioWriter) pad() { c.copy(strings.NewReader("\x00\x00\x00"[:-c.n&3])) }

// parents writes the directories above name that are not there yet.
func (c *cpioWriter) parents(name string) {
	dir := path.Dir(name)
	if dir == "." || dir == "/" || slices.Contains(c.dirs, dir) {
		return
	}
	c.parents(dir)
	c.dirs = append(c.dirs, dir)
	c.member(dir, 0o040755, 0, strings.NewReader(""))
}

// text writes a file with a content.
func (c *cpioWriter) text(name string, perm uint32, content string) {
	c.parents(name)
	c.member(name, 0o100000|perm, int64(len(content)), strings.NewReader(content))
}

// symlink writes a symbolic link.
func (c *cpioWriter) symlink(name, target string) {
	c.parents(name)
	c.member(name, 0o120777, int64(len(target)), strings.NewReader(target))
}

// file copies a file of this machine to name.
func (c *cpioWriter) file(name, from string) {
	f, err := os.Open(from)
	if err != nil {
		c.fail(err)
		return
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		c.fail(err)
		return
	}
	c.parents(name)
	c.member(name, 0o100000|uint32(fi.Mode().Perm()), fi.Size(), f)
}

func (c *cpioWriter) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// end writes the trailer. The kernel takes archives one behind the other, each at a multiple of 4 bytes.
func (c *cpioWriter) end() error {
	c.member("TRAILER!!!", 0, 0, strings.NewReader(""))
	return c.err
}

package imagefile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"csi-qcow2/cache"
	"csi-qcow2/qcow2"
)

// Options say how Open opens an image file. The zero value probes the format
// and opens read-write.
type Options struct {
	Format   string // "qcow2", "raw", or "" to probe
	ReadOnly bool
	// Snapshot opens the internal snapshot with this ID or else this name; requires ReadOnly.
	Snapshot string
	// Cache is the metadata cache of all images of the chain; nil gives each its own.
	Cache     *cache.Cache
	CacheMode CacheMode
	// ID and Unclean are qcow2.Options' of an image that is opened read-write.
	ID      [16]byte
	Unclean bool
	// Discard gives discarded space back to the host file.
	Discard bool
	// ForceShare tolerates other processes that write the files; requires ReadOnly.
	ForceShare bool
	// NoBacking leaves backing files closed: reading what they hold fails.
	NoBacking bool
	// NoWriters keeps others from writing a raw disk at the top while it is open read-only, too:
	// for whoever copies it. ForceShare wins.
	NoWriters bool
}

// Info says what Open opened.
type Info struct {
	Name   string // as given
	Format string // "qcow2" or "raw"
	Probed bool   // the format was guessed
}

// maxDepth is the longest backing chain that is opened.
const maxDepth = 200

// OpenFile opens only the host file of the image name, and says what it holds:
// for what works on the file itself, like a check. Of o it regards Format,
// ReadOnly, CacheMode and ForceShare.
func OpenFile(ctx context.Context, name string, o Options) (qcow2.File, Info, error) {
	n, err := parseName(name)
	if err != nil {
		return nil, Info{}, err
	}
	if o.Format != "" {
		n = n.withFormat(o.Format)
	}
	op := opener{opts: o}
	no := nodeOptions{readOnly: o.ReadOnly, forceShare: o.ForceShare}.below(n)
	file, _, err := op.openFile(ctx, n, no, nil)
	if err != nil {
		return nil, Info{}, err
	}
	info := Info{Name: name, Format: n.driver}
	if info.Format == "" {
		info.Probed = true
		info.Format, err = probe(file, n.name)
	}
	if err == nil {
		err = op.lock(file, info.Format, no, nil)
	}
	if err != nil {
		file.Close()
		return nil, Info{}, err
	}
	return file, info, nil
}

// Open opens the image file name with its backing chain. Errors are
// *BackingError for a fault below the top, *FormatError, *NameError, and those
// of qcow2.OpenFile and qcow2.Open.
func Open(ctx context.Context, name string, o Options) (qcow2.Disk, Info, error) {
	if !o.ReadOnly && (o.Snapshot != "" || o.ForceShare) {
		return nil, Info{}, errors.New("imagefile: an internal snapshot or a shared image can only be opened read-only")
	}
	n, err := parseName(name)
	if err != nil {
		return nil, Info{}, err
	}
	if o.Format != "" {
		n = n.withFormat(o.Format)
	}
	op := opener{opts: o}
	top := nodeOptions{readOnly: o.ReadOnly, forceShare: o.ForceShare, snapshot: o.Snapshot}
	opened, err := op.open(ctx, n, top, nil)
	if err != nil {
		return nil, Info{}, err
	}
	return opened.disk, Info{Name: name, Format: opened.format, Probed: opened.probed}, nil
}

// An opener opens one chain.
type opener struct{ opts Options }

// nodeOptions are what differs between the levels of a chain.
type nodeOptions struct {
	readOnly   bool
	forceShare bool
	snapshot   string
}

// below returns o with what n itself demands.
func (o nodeOptions) below(n *node) nodeOptions {
	o.forceShare = o.forceShare || n.forceShare
	o.readOnly = o.readOnly || n.readOnly || o.forceShare
	return o
}

// A level is a file that is open, and those above it.
type level struct {
	dev, ino uint64
	above    *level
	depth    int
}

// opened is an open disk.
type opened struct {
	disk   qcow2.Disk
	format string
	probed bool
	at     *level // of its host file
}

// open opens n, whose overlay is above.
func (op *opener) open(ctx context.Context, n *node, o nodeOptions, above *level) (opened, error) {
	if err := ctx.Err(); err != nil {
		return opened{}, err
	}
	o = o.below(n)
	file, at, err := op.openFile(ctx, n, o, above)
	if err != nil {
		return opened{}, err
	}
	res := opened{format: n.driver, at: at}
	if res.format == "" {
		res.probed = true
		if res.format, err = probe(file, n.name); err != nil {
			file.Close()
			return opened{}, err
		}
	}
	if err := op.lock(file, res.format, o, above); err != nil {
		file.Close()
		return opened{}, err
	}
	switch res.format {
	case "qcow2":
		res.disk, err = op.openQcow2(ctx, file, n, o, at)
	case "raw":
		res.disk, err = op.openRaw(file, n, o, res.probed)
	default:
		err = &FormatError{Name: n.name, Format: res.format}
	}
	if err != nil {
		file.Close()
		return opened{}, err
	}
	if op.opts.CacheMode.syncsWrites() && !o.readOnly {
		res.disk = synced(res.disk)
	}
	return res, nil
}

// lock takes the lock of a reader once the format is known. As in QEMU, a raw
// disk at the top may be read while others write it, unless Options.NoWriters
// is set: it has no metadata that could change under the reader. A backing file
// may not.
func (op *opener) lock(file qcow2.File, format string, o nodeOptions, above *level) error {
	f, ok := file.(*qcow2.OSFile)
	if !ok || !o.readOnly || o.forceShare || format == "raw" && above == nil && !op.opts.NoWriters {
		return nil
	}
	return f.Lock(qcow2.LockRead)
}

func (op *opener) openQcow2(ctx context.Context, file qcow2.File, n *node, o nodeOptions, at *level) (qcow2.Disk, error) {
	var id [16]byte
	if !o.readOnly { // backing files are many, and nobody writes them
		id = op.opts.ID
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{
		ReadOnly:    o.readOnly,
		ID:          id,
		Unclean:     op.opts.Unclean,
		Snapshot:    o.snapshot,
		Cache:       op.opts.Cache,
		PassDiscard: op.opts.Discard,
		NoFlush:     op.opts.CacheMode == CacheUnsafe,
		OpenBacking: func(ctx context.Context, name, format string) (qcow2.Disk, error) {
			return op.openBacking(ctx, n, name, format, o, at)
		},
	})
	if err != nil {
		return nil, err // a nil *Image would not be a nil Disk
	}
	return im, nil
}

func (op *opener) openRaw(file qcow2.File, n *node, o nodeOptions, probed bool) (qcow2.Disk, error) {
	if o.snapshot != "" {
		return nil, ErrNoSnapshots
	}
	raw, err := qcow2.OpenRaw(file, qcow2.RawOptions{
		ReadOnly:    o.readOnly,
		Size:        n.size,
		PassDiscard: op.opts.Discard,
		NoFlush:     op.opts.CacheMode == CacheUnsafe,
	})
	if err != nil {
		return nil, err
	}
	if probed && !o.readOnly {
		return &guardedRaw{raw}, nil
	}
	return raw, nil
}

// openBacking opens the backing file that the image n names.
func (op *opener) openBacking(ctx context.Context, n *node, name, format string, o nodeOptions, at *level) (qcow2.Disk, error) {
	backing, err := n.backingNode(name, format)
	if err != nil {
		return nil, &BackingError{Overlay: n.name, Err: err}
	}
	if backing == nil || op.opts.NoBacking {
		return absentDisk{name}, nil
	}
	// A backing file is read, never written, whatever happens above.
	res, err := op.open(ctx, backing, nodeOptions{readOnly: true, forceShare: o.forceShare}, at)
	if err != nil {
		return nil, &BackingError{Overlay: n.name, Err: err}
	}
	return res.disk, nil
}

// openFile opens what n keeps its bytes in: a host file, or another image.
func (op *opener) openFile(ctx context.Context, n *node, o nodeOptions, above *level) (qcow2.File, *level, error) {
	if n.file != nil {
		if !o.readOnly {
			return nil, nil, &NameError{Name: n.name, Msg: "an image inside an image can only be opened read-only"}
		}
		res, err := op.open(ctx, n.file, nodeOptions{readOnly: true, forceShare: o.forceShare}, above)
		if err != nil {
			return nil, nil, err
		}
		return &diskFile{disk: res.disk, name: n.file.name}, res.at, nil
	}
	fo := qcow2.FileOptions{ReadOnly: o.readOnly, Direct: op.opts.CacheMode.direct(), Lock: qcow2.LockWrite}
	if o.readOnly {
		fo.Lock = qcow2.LockShared // for the probe; see lock
	}
	if err := checkFile(n.filename, above); err != nil {
		return nil, nil, err
	}
	f, err := qcow2.OpenFile(n.filename, fo)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, deeper(above, identity(st)), nil
}

// checkFile refuses a path that is no file or is open above already. It comes
// before the open, because a lock of our own would hide the loop.
func checkFile(path string, above *level) error {
	st, err := os.Stat(path)
	if err != nil {
		var pathErr *os.PathError
		if errors.As(err, &pathErr) {
			pathErr.Op = "open"
		}
		return err
	}
	if above != nil && above.depth >= maxDepth {
		return fmt.Errorf("%w: more than %d files at %q", ErrChain, maxDepth, path)
	}
	id := identity(st)
	for l := above; l != nil; l = l.above {
		if id.ino != 0 && l.dev == id.dev && l.ino == id.ino {
			return fmt.Errorf("%w: it comes back to %q", ErrChain, path)
		}
	}
	return nil
}

// identity returns the level of a file by which it is recognised.
func identity(st os.FileInfo) level {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return level{dev: uint64(sys.Dev), ino: sys.Ino}
	}
	return level{}
}

// deeper returns l below above.
func deeper(above *level, l level) *level {
	l.above = above
	if above != nil {
		l.depth = above.depth + 1
	}
	return &l
}

// FullBackingName returns the name by which the backing file of the image
// name is opened: relative to the directory of the image, not to ours.
func FullBackingName(name, backing string) (string, error) {
	if backing == "" || hasProtocol(backing) || filepath.IsAbs(backing) {
		return backing, nil
	}
	if isJSON(name) {
		return "", &NameError{Name: backing, Msg: fmt.Sprintf("it is relative, and its image %q has no directory", name)}
	}
	dir, _ := filepath.Split(trimFile(name))
	return dir + backing, nil
}

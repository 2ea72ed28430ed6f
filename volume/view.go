package volume

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// A view lets stock QEMU read an internal snapshot as if it were an image:
//
//	C (clone)   backing file, format qcow2, named by
//	            json:{"driver":"qcow2","force-share":true,"file":{"driver":"qcow2","file":
//	                  {"driver":"file","filename":"<pool>/volumes/<A>/views/<S>.qcow2"}}}
//	H (view)    a qcow2 image whose backing file is A opened as raw, and whose
//	            first guest cluster is A's first bytes with a patched header
//	A (source)  any image of the pool; it may be attached
//
// QEMU opens H as the protocol layer of a qcow2 image: the header it finds there
// says that the snapshot's L1 table is the active one, and every offset in the
// tables is an offset in A, which H passes through. This is right because no
// writer changes a cluster that the snapshot S references while S exists (only
// COPIED bits in its L2 tables, which readers ignore). So S, A and H stay where
// they are until the last clone is gone. Our own engine does not go through H:
// it opens A with S as the state to read.
//
// The rejected alternatives: an external snapshot moves the active file under a
// running export; a copy of the tables is not O(1) on a pool without reflinks.

// A viewRef names a view: an internal snapshot of a volume.
type viewRef struct{ Volume, Snapshot string }

const (
	// maxBackingName is the limit of qcow2 for a backing file name, in bytes.
	maxBackingName = 1023
	// viewSize is the virtual size of a view in bytes: beyond every host offset
	// that its source can have.
	viewSize = 256 << 40
	// viewClusterSize is the cluster size of a view. Its first cluster holds the
	// source's header, extensions and backing name, patched.
	viewClusterSize = 64 << 10
	// maxChainDepth is how many clones of clones there may be.
	maxChainDepth = 16
)

// A backingSpec is the content of a json: backing name.
type backingSpec struct {
	Driver     string      `json:"driver"`
	ForceShare bool        `json:"force-share"`
	File       backingFile `json:"file"`
}

type backingFile struct {
	Driver string      `json:"driver"`
	File   backingLeaf `json:"file"`
}

type backingLeaf struct {
	Driver   string `json:"driver"`
	Filename string `json:"filename"`
}

const jsonPrefix = "json:"

// backingName returns the backing file name of a clone of v.
func (p *Pool) backingName(v viewRef) string {
	b, err := json.Marshal(backingSpec{"qcow2", true, backingFile{"qcow2", backingLeaf{"file", path.Join(p.path, viewName(v))}}})
	if err != nil {
		panic(err) // three strings and a bool
	}
	return jsonPrefix + string(b)
}

// viewPath matches the end of a view's file name. What is before it is the
// pool's path when the clone was made: the IDs say the same, and stay true when
// the pool is moved.
var viewPath = regexp.MustCompile(`^/(?:.*/)?volumes/(vol-[0-9a-f]{8}-[0-9a-f]{32})/views/(snap-[0-9a-f]{8}-[0-9a-f]{32})\.qcow2$`)

// parseBackingName is the inverse of backingName.
func parseBackingName(name string) (viewRef, error) {
	spec := backingSpec{}
	if len(name) > len(jsonPrefix) && name[:len(jsonPrefix)] == jsonPrefix {
		if err := json.Unmarshal([]byte(name[len(jsonPrefix):]), &spec); err != nil {
			return viewRef{}, fmt.Errorf("%w: backing file name %q: %v", ErrDamaged, name, err)
		}
	}
	m := viewPath.FindStringSubmatch(spec.File.File.Filename)
	if m == nil || spec.Driver != "qcow2" || spec.File.Driver != "qcow2" || spec.File.File.Driver != "file" {
		return viewRef{}, fmt.Errorf("%w: backing file name %q is not a view of this pool", ErrDamaged, name)
	}
	return viewRef{m[1], m[2]}, nil
}

// The part of a qcow2 header that a view needs, big endian:
//
//	Offset  Size  Field                     In the view
//	     0     4  magic "QFI\xfb"           kept
//	     8     8  backing_file_offset       kept
//	    16     4  backing_file_size         kept
//	    24     8  size                      the snapshot's
//	    36     4  l1_size                   the snapshot's
//	    40     8  l1_table_offset           the snapshot's
//	    60     4  nb_snapshots              0
//	    64     8  snapshots_offset          0
//	    72     8  incompatible_features     without dirty and corrupt
//	    88     8  autoclear_features        0
//
// Spec: qcow2 "Header".
const (
	headerBytes        = 104
	incompatibleDirty  = 1 << 0
	incompatibleBroken = 1 << 1
)

// readHeader reads the fixed part of the header of a version 3 image.
func readHeader(f io.ReaderAt) ([]byte, error) {
	h := make([]byte, headerBytes)
	if _, err := f.ReadAt(h, 0); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: image of less than %d bytes", ErrDamaged, headerBytes)
		}
		return nil, err
	}
	if string(h[:4]) != "QFI\xfb" || binary.BigEndian.Uint32(h[4:]) != 3 {
		return nil, fmt.Errorf("%w: not a qcow2 image of version 3", ErrDamaged)
	}
	return h, nil
}

// readBackingName returns the backing file name of the image f, "" for none.
func readBackingName(f io.ReaderAt) (string, error) {
	h, err := readHeader(f)
	if err != nil {
		return "", err
	}
	off, n := binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:])
	if off == 0 {
		return "", nil
	}
	if n == 0 || n > maxBackingName || off > maxClusterSize {
		return "", fmt.Errorf("%w: backing file name of %d bytes at %#x", ErrDamaged, n, off)
	}
	name := make([]byte, n)
	if _, err := f.ReadAt(name, int64(off)); err != nil {
		return "", fmt.Errorf("%w: backing file name at %#x: %v", ErrDamaged, off, err)
	}
	return string(name), nil
}

// patchHeader makes the internal snapshot s, whose L1 table has entries entries
// at off, the active state of the header in b.
func patchHeader(b []byte, s qcow2.Snapshot, off qcow2.HostOffset, entries int) {
	binary.BigEndian.PutUint64(b[24:], uint64(s.DiskSize))
	binary.BigEndian.PutUint32(b[36:], uint32(entries))
	binary.BigEndian.PutUint64(b[40:], uint64(off))
	clear(b[60:72]) // nb_snapshots, snapshots_offset
	features := binary.BigEndian.Uint64(b[72:])
	binary.BigEndian.PutUint64(b[72:], features&^(incompatibleDirty|incompatibleBroken))
	clear(b[88:96]) // autoclear_features: what they vouch for is not kept up here
}

// viewHeader returns the first viewClusterSize bytes of v's volume as they
// would be if v's snapshot were its active state.
func (p *Pool) viewHeader(ctx context.Context, v viewRef) (b []byte, err error) {
	d, err := p.openAny(ctx, v.Volume)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	off, entries, err := d.Image.L1TableOf(v.Snapshot)
	if err != nil {
		return nil, err
	}
	all := d.Image.Snapshots()
	i := slices.IndexFunc(all, func(s qcow2.Snapshot) bool { return s.Name == v.Snapshot })
	if i < 0 {
		return nil, fmt.Errorf("%w: %s", qcow2.ErrSnapshotNotFound, v.Snapshot)
	}
	f, err := p.dir.OpenFile(path.Join(volumeDir(v.Volume), diskName), unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := readHeader(f); err != nil {
		return nil, err
	}
	b = make([]byte, viewClusterSize)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) { // a short file ends in zeroes
		return nil, err
	}
	patchHeader(b, all[i], off, entries)
	return b, nil
}

// ensureView makes the view v durable unless it exists. The caller holds the ID
// lock of v's volume, and v's snapshot is durable in the image.
func (p *Pool) ensureView(ctx context.Context, v viewRef) error {
	e := p.find(v.Volume)
	p.mu.Lock()
	exists := e.views[v.Snapshot]
	p.mu.Unlock()
	if exists {
		return nil
	}
	if err := p.makeView(ctx, v, p.dir.Publish); err != nil {
		return err
	}
	p.mu.Lock()
	e.views[v.Snapshot] = true
	p.mu.Unlock()
	return nil
}

// makeView writes the view v aside, and gives it its name by put.
func (p *Pool) makeView(ctx context.Context, v viewRef, put func(from, to string) error) error {
	incoming := incomingName(v.Snapshot + ".qcow2")
	if err := p.writeView(ctx, v, incoming); err != nil {
		return errors.Join(spaceError(err), p.dir.Remove(incoming))
	}
	return put(incoming, viewName(v))
}

// renewViews makes the views of e anew, whose image has no backing file any more: they
// name it still, and stock QEMU would look for it.
func (p *Pool) renewViews(ctx context.Context, e *entry) error {
	unlock, err := p.locks.visit(ctx, e.id)
	if err != nil {
		return err
	}
	defer unlock()
	p.mu.Lock()
	snapshots := slices.Sorted(maps.Keys(e.views))
	p.mu.Unlock()
	for _, id := range snapshots {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// As in copyEntry, an open that is given up would be in the way.
		err := p.makeView(context.WithoutCancel(ctx), viewRef{e.id, id}, p.dir.Replace)
		if err != nil && !errors.Is(err, qcow2.ErrSnapshotNotFound) { // the view of none is waste
			return err
		}
	}
	return nil
}

// removeView removes the view of a snapshot of e; its absence is success. Nothing may depend on it.
func (p *Pool) removeView(e *entry, snapshot string) error {
	p.mu.Lock()
	exists := e.views[snapshot]
	p.mu.Unlock()
	if !exists {
		return nil
	}
	if err := p.dir.Remove(viewName(viewRef{e.id, snapshot})); err != nil {
		return err
	}
	p.mu.Lock()
	delete(e.views, snapshot)
	p.mu.Unlock()
	return nil
}

// writeView writes the view v into the new file name.
func (p *Pool) writeView(ctx context.Context, v viewRef, name string) error {
	header, err := p.viewHeader(ctx, v)
	if err != nil {
		return fmt.Errorf("view of %s: %w", v.Volume, err)
	}
	return p.createImage(ctx, name, viewSize, qcow2.CreateOptions{
		ClusterSize: viewClusterSize,
		BackingFile: path.Join(p.path, volumeDir(v.Volume), diskName), BackingFormat: "raw",
	}, header, false)
}

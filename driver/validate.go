package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"csi-qcow2/volume"
)

// The size limits of the specification, in bytes. Paths have the system's.
const (
	maxStringBytes = 128
	maxMapBytes    = 4 << 10
	maxNodeIDBytes = 256
	maxPathBytes   = 4095
	maxIDsBytes    = 64 << 10 // a list of IDs: more than a thousand of ours
)

// stringLimits are the fields that the specification exempts from maxStringBytes.
var stringLimits = map[protoreflect.Name]int{
	"staging_target_path": maxPathBytes,
	"target_path":         maxPathBytes,
	"volume_path":         maxPathBytes,
	"volume_publish_path": maxPathBytes,
	"node_id":             maxNodeIDBytes,
	"mount_flags":         maxMapBytes,
}

// listLimits are the lists whose strings together may pass maxMapBytes.
var listLimits = map[protoreflect.Name]int{
	"source_volume_ids": maxIDsBytes,
	"snapshot_ids":      maxIDsBytes,
}

// checkLimits refuses requests with a string or a map beyond its limit, or
// with control characters in a string.
func checkLimits(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if m, ok := req.(proto.Message); ok {
		if err := checkMessage(m.ProtoReflect()); err != nil {
			return nil, err
		}
	}
	return handler(ctx, req)
}

func checkMessage(m protoreflect.Message) (err error) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		err = checkField(field, v)
		return err == nil
	})
	return err
}

func checkField(field protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch {
	case field.IsMap():
		return checkMap(field, v.Map())
	case field.IsList():
		total := 0
		for i := range v.List().Len() {
			item := v.List().Get(i)
			if err := checkSingle(field, item); err != nil {
				return err
			}
			if field.Kind() == protoreflect.StringKind {
				total += len(item.String())
			}
		}
		limit := maxMapBytes
		if n, ok := listLimits[field.Name()]; ok {
			limit = n
		}
		if total > limit {
			return fmt.Errorf("%w: %s of %d bytes, at most %d", errInvalid, field.Name(), total, limit)
		}
		return nil
	}
	return checkSingle(field, v)
}

func checkSingle(field protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch field.Kind() {
	case protoreflect.MessageKind:
		return checkMessage(v.Message())
	case protoreflect.StringKind:
		return checkString(string(field.Name()), v.String(), stringLimits[field.Name()])
	}
	return nil
}

func checkString(name, s string, limit int) error {
	if limit == 0 {
		limit = maxStringBytes
	}
	if len(s) > limit {
		return fmt.Errorf("%w: %s of %d bytes, at most %d", errInvalid, name, len(s), limit)
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%w: %s contains a control character", errInvalid, name)
	}
	return nil
}

func checkMap(field protoreflect.FieldDescriptor, m protoreflect.Map) error {
	total := 0
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		total += len(k.String())
		if field.MapValue().Kind() == protoreflect.StringKind {
			total += len(v.String())
		}
		return true
	})
	if total > maxMapBytes {
		return fmt.Errorf("%w: %s of %d bytes, at most %d", errInvalid, field.Name(), total, maxMapBytes)
	}
	return nil
}

// firstOf returns the first error: one thing at a time is enough to mend.
func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// required refuses an empty field.
func required(name, value string) error {
	if value == "" {
		return fmt.Errorf("%w: %s is missing", errInvalid, name)
	}
	return nil
}

// checkPath refuses what is no clean absolute path, or leads to a symbolic link. A
// slash may follow; filepath.Clean takes it off.
func checkPath(name, path string) error {
	if err := required(name, path); err != nil {
		return err
	}
	if !filepath.IsAbs(path) || filepath.Clean(path) != strings.TrimSuffix(path, "/") || path == "/" {
		return fmt.Errorf("%w: %s %q is not a clean absolute path", errInvalid, name, path)
	}
	if info, err := os.Lstat(filepath.Clean(path)); err == nil && info.Mode()&os.ModeSymlink != 0 {
		return fmt.Errorf("%w: %s %q is a symbolic link", errInvalid, name, path)
	}
	return nil
}

// The access modes of a pool that lives on one node.
var accessModes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// The filesystems that can be made and mounted.
const (
	fsExt4 = "ext4"
	fsXFS  = "xfs"
)

// minXFSBytes is the least size that mkfs.xfs makes a filesystem of.
const minXFSBytes = 300 << 20

// minSize returns the least size of a volume with the capabilities caps, in bytes.
func minSize(caps []*csi.VolumeCapability) int64 {
	for _, c := range caps {
		if c.GetMount().GetFsType() == fsXFS {
			return minXFSBytes
		}
	}
	return volume.MinSize
}

// mountFlags are what a StorageClass or PersistentVolume may ask of mount(8).
// Nothing that names a file, runs a program, or weakens nosuid and nodev.
var mountFlags = []string{
	"ro", "rw", "sync", "dirsync", "noexec", "nosuid", "nodev",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "strictatime", "lazytime", "nolazytime",
	"discard", "nodiscard", "nouuid", "barrier", "inode64",
	"usrquota", "grpquota", "prjquota", "uquota", "gquota", "pquota",
}

// checkCapability refuses a capability that no volume here can have.
func checkCapability(c *csi.VolumeCapability) error {
	if c == nil {
		return fmt.Errorf("%w: volume_capability is missing", errInvalid)
	}
	switch {
	case c.GetMount() == nil && c.GetBlock() == nil:
		return fmt.Errorf("%w: access_type is missing", errInvalid)
	case !slices.Contains(accessModes, c.GetAccessMode().GetMode()):
		return fmt.Errorf("%w: access_mode %s: a volume is on one node; use a SINGLE_NODE mode", errInvalid, c.GetAccessMode().GetMode())
	}
	if m := c.GetMount(); m != nil {
		return checkMount(m)
	}
	return nil
}

func checkMount(m *csi.VolumeCapability_MountVolume) error {
	switch m.GetFsType() {
	case "", fsExt4, fsXFS:
	default:
		return fmt.Errorf("%w: fs_type %q: use %s or %s", errInvalid, m.GetFsType(), fsExt4, fsXFS)
	}
	for _, flag := range m.GetMountFlags() {
		if !slices.Contains(mountFlags, flag) {
			return fmt.Errorf("%w: mount flag %q is not allowed; allowed are %s", errInvalid, flag, strings.Join(mountFlags, ", "))
		}
	}
	if m.GetVolumeMountGroup() != "" {
		return fmt.Errorf("%w: volume_mount_group is not supported", errInvalid)
	}
	return nil
}

// checkCapabilities refuses an empty list and any impossible member.
func checkCapabilities(caps []*csi.VolumeCapability) error {
	if len(caps) == 0 {
		return fmt.Errorf("%w: volume_capabilities are missing", errInvalid)
	}
	for _, c := range caps {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

// checkPage refuses a negative page size.
func checkPage(maxEntries int32) error {
	if maxEntries < 0 {
		return fmt.Errorf("%w: max_entries %d is negative", errInvalid, maxEntries)
	}
	return nil
}

package imagefile

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// A node is an image as a name describes it: a driver on a host file, or on
// another image.
type node struct {
	name       string // for messages, and for relative backing names unless it is json:
	driver     string // "" to probe
	filename   string // of the host file, when file is nil
	file       *node  // the image that holds the bytes
	size       int64  // virtual size of a raw driver, 0 if not given
	forceShare bool
	readOnly   bool
	noBacking  bool  // "backing": null
	backing    *node // "backing": {…}
}

// withFormat returns n with its driver set.
func (n *node) withFormat(format string) *node {
	m := *n
	m.driver = format
	return &m
}

// backingNode returns the backing file of n, which n's header calls name. It
// is nil when n was opened without it.
func (n *node) backingNode(name, format string) (*node, error) {
	if n.noBacking {
		return nil, nil
	}
	if n.backing != nil {
		return n.backing, nil
	}
	full, err := FullBackingName(n.name, name)
	if err != nil {
		return nil, err
	}
	b, err := parseName(full)
	if err != nil {
		return nil, err
	}
	if format != "" {
		b = b.withFormat(format) // what the overlay records wins, as in QEMU
	}
	return b, nil
}

// isJSON reports whether name describes the image in JSON.
func isJSON(name string) bool { return strings.HasPrefix(name, "json:") }

// trimFile removes the file: protocol.
func trimFile(name string) string { return strings.TrimPrefix(name, "file:") }

// hasProtocol reports whether name begins with a protocol: a colon before any slash.
func hasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// parseName parses the name of an image.
func parseName(name string) (*node, error) {
	switch {
	case isJSON(name):
		return parseJSON(name)
	case strings.HasPrefix(name, "file:"):
		return &node{name: name, filename: trimFile(name)}, nil
	case hasProtocol(name):
		protocol, _, _ := strings.Cut(name, ":")
		return nil, &NameError{
			Name: name, Protocol: protocol,
			Msg: fmt.Sprintf("protocol %q is not supported; a file with a colon in its name is file:NAME", protocol),
		}
	}
	return &node{name: name, filename: name}, nil
}

// parseJSON parses a json: name.
func parseJSON(name string) (*node, error) {
	fail := func(format string, args ...any) (*node, error) {
		return nil, &NameError{Name: name, Msg: fmt.Sprintf(format, args...)}
	}
	dec := json.NewDecoder(strings.NewReader(strings.TrimPrefix(name, "json:")))
	dec.UseNumber()
	var object map[string]any
	if err := dec.Decode(&object); err != nil {
		return fail("%v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fail("text after the JSON object")
	}
	n, err := nodeOf(nest(object))
	if err != nil {
		return fail("%v", err)
	}
	if n.driver == "file" || n.driver == "host_device" {
		n.driver = "raw" // bytes without a format above them
	}
	if n.file != nil {
		n.name = name
	}
	return n, nil
}

// nest turns dotted keys into objects: {"file.filename": x} is {"file": {"filename": x}}.
func nest(object map[string]any) map[string]any {
	out := make(map[string]any, len(object))
	for key, value := range object {
		if inner, ok := value.(map[string]any); ok {
			value = nest(inner)
		}
		head, rest, dotted := strings.Cut(key, ".")
		if dotted {
			value = nest(map[string]any{rest: value})
		}
		inner, isObject := value.(map[string]any)
		if have, ok := out[head].(map[string]any); ok && isObject {
			for k, v := range inner {
				have[k] = v
			}
			continue
		}
		out[head] = value
	}
	return out
}

// nodeOf returns the node that object describes.
func nodeOf(object map[string]any) (*node, error) {
	n := &node{}
	for key, value := range object {
		if err := n.set(key, value); err != nil {
			return nil, err
		}
	}
	host := n.driver == "file" || n.driver == "host_device"
	switch {
	case host && n.file != nil:
		return nil, fmt.Errorf("driver %q has no key \"file\"", n.driver)
	case host && n.filename == "":
		return nil, fmt.Errorf("driver %q needs a filename", n.driver)
	case host:
		return n, nil
	case n.filename != "" && n.file != nil:
		return nil, fmt.Errorf("both \"filename\" and \"file\" are given")
	case n.filename != "" && n.driver != "":
		return nil, fmt.Errorf("driver %q takes \"file\", not \"filename\"", n.driver)
	case n.file == nil && n.filename == "":
		return nil, fmt.Errorf("a \"file\" is needed")
	}
	if f := n.file; f != nil && (f.driver == "file" || f.driver == "host_device" || f.driver == "" && f.file == nil) {
		// The ordinary case: a format on a host file.
		n.filename, n.file = f.filename, nil
		n.forceShare = n.forceShare || f.forceShare
		n.readOnly = n.readOnly || f.readOnly
	}
	n.name = n.filename
	if n.file != nil {
		n.name = n.file.name
	}
	return n, nil
}

// set sets one key.
func (n *node) set(key string, value any) (err error) {
	switch key {
	case "driver":
		n.driver, err = stringOf(key, value)
	case "filename":
		n.filename, err = stringOf(key, value)
		n.filename = trimFile(n.filename)
		if err == nil && n.filename == "" {
			return fmt.Errorf("key %q is empty", key)
		}
	case "force-share":
		n.forceShare, err = boolOf(key, value)
	case "read-only":
		n.readOnly, err = boolOf(key, value)
	case "size":
		n.size, err = sizeOf(key, value)
	case "file":
		n.file, err = childOf(key, value)
	case "backing":
		if value == nil {
			n.noBacking = true
			return nil
		}
		n.backing, err = childOf(key, value)
	default:
		return fmt.Errorf("key %q is not supported", key)
	}
	return err
}

func childOf(key string, value any) (*node, error) {
	object, ok := value.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("key %q must be an object", key)
	}
	child, err := nodeOf(object)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", key, err)
	}
	if key == "backing" && (child.driver == "file" || child.driver == "host_device") {
		child.driver = "raw"
	}
	return child, nil
}

func stringOf(key string, value any) (string, error) {
	if s, ok := value.(string); ok {
		return s, nil
	}
	return "", fmt.Errorf("key %q must be a string", key)
}

// boolOf accepts the strings that QEMU accepts for a bool, too.
func boolOf(key string, value any) (bool, error) {
	switch value {
	case true, "on", "yes", "true", "y":
		return true, nil
	case false, "off", "no", "false", "n":
		return false, nil
	}
	return false, fmt.Errorf("key %q must be a boolean", key)
}

func sizeOf(key string, value any) (int64, error) {
	var text string
	switch v := value.(type) {
	case json.Number:
		text = v.String()
	case string:
		text = v
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/2 {
		return 0, fmt.Errorf("key %q must be a size in bytes", key)
	}
	return n, nil
}

// HostPath returns the path of the host file that holds the bytes of the image
// name, "" if there is none or name cannot be parsed. Of an image inside an
// image it is that of the innermost.
func HostPath(name string) string {
	n, err := parseName(name)
	if err != nil {
		return ""
	}
	for n.file != nil {
		n = n.file
	}
	return n.filename
}

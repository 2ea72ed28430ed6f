package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// An imgParam describes a parameter of -o.
type imgParam struct {
	name     string
	kind     paramKind
	help     string
	fallback string // printed and used when it is not given; "" for none
	host     bool   // of the host file, not of the format
	refused  string // if not "", only this value is supported
}

// A paramKind is the type of a parameter.
type paramKind string

const (
	paramString paramKind = "<str>"
	paramSize   paramKind = "<size>"
	paramNumber paramKind = "<num>"
	paramBool   paramKind = "<bool (on/off)>"
)

// imgParams are the parameters of each format in the order in which qemu-img
// prints them. Those that only QEMU's own formats use are left out of none:
// they are known, and refused by name.
var imgParams = map[string][]imgParam{
	"qcow2": {
		{name: "encryption", kind: paramBool, help: "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)", refused: "off"},
		{name: "encrypt.format", kind: paramString, help: "Encrypt the image, format choices: 'aes', 'luks'", refused: "none"},
		{name: "cluster_size", kind: paramSize, help: "qcow2 cluster size", fallback: "65536"},
		{name: "extended_l2", kind: paramBool, help: "Extended L2 tables", fallback: "off", refused: "off"},
		{name: "preallocation", kind: paramString, help: "Preallocation mode (allowed values: off, metadata, falloc, full)"},
		{name: "compression_type", kind: paramString, help: "Compression method used for image cluster compression", fallback: "zlib"},
		{name: "size", kind: paramSize, help: "Virtual disk size"},
		{name: "compat", kind: paramString, help: "Compatibility level (v2 [0.10] or v3 [1.1])"},
		{name: "data_file", kind: paramString, help: "File name of an external data file", refused: "none"},
		{name: "data_file_raw", kind: paramBool, help: "The external data file must stay valid as a raw image", refused: "off"},
		{name: "backing_file", kind: paramString, help: "File name of a base image"},
		{name: "backing_fmt", kind: paramString, help: "Image format of the base image"},
		{name: "lazy_refcounts", kind: paramBool, help: "Postpone refcount updates", fallback: "off"},
		{name: "refcount_bits", kind: paramNumber, help: "Width of a reference count entry in bits", fallback: "16"},
		{name: "nocow", kind: paramBool, help: "Turn off copy-on-write (valid only on btrfs)", host: true, refused: "off"},
	},
	"raw": {
		{name: "size", kind: paramSize, help: "Virtual disk size"},
		{name: "nocow", kind: paramBool, help: "Turn off copy-on-write (valid only on btrfs)", host: true, refused: "off"},
		{name: "preallocation", kind: paramString, help: "Preallocation mode (allowed values: off, falloc, full)", host: true},
	},
}

// imgParamValues are the parameters of one image as given, plus fallbacks.
type imgParamValues struct {
	format string
	values map[string]string
}

// newImgParams returns the parameters of format with their fallbacks set.
func newImgParams(format string) (*imgParamValues, error) {
	params, ok := imgParams[format]
	if !ok {
		return nil, imgErrorf("Unknown file format '%s'", format)
	}
	p := &imgParamValues{format: format, values: map[string]string{}}
	for _, param := range params {
		if param.fallback != "" {
			p.values[param.name] = param.fallback
		}
	}
	return p, nil
}

// validOptionList reports whether list can be joined with others by commas, as
// qemu-img demands: no empty part at either end.
func validOptionList(list string) bool {
	if list == "" || strings.HasPrefix(list, ",") {
		return false
	}
	trailing := len(list) - len(strings.TrimRight(list, ","))
	return trailing%2 == 0
}

// splitOptions splits NAME=VALUE,… where a doubled comma stands for a comma.
func splitOptions(list string) []string {
	var parts []string
	var part strings.Builder
	for i := 0; i < len(list); i++ {
		if list[i] != ',' {
			part.WriteByte(list[i])
			continue
		}
		if i+1 < len(list) && list[i+1] == ',' {
			part.WriteByte(',')
			i++
			continue
		}
		parts = append(parts, part.String())
		part.Reset()
	}
	return append(parts, part.String())
}

// wantsOptionHelp reports whether an option list asks for the list of options.
func wantsOptionHelp(list string) bool {
	parts := splitOptions(list)
	return slices.Contains(parts, "help") || slices.Contains(parts, "?")
}

// parse sets what list gives.
func (p *imgParamValues) parse(list string) error {
	if list == "" {
		return nil
	}
	for _, part := range splitOptions(list) {
		name, value, given := strings.Cut(part, "=")
		i := slices.IndexFunc(imgParams[p.format], func(param imgParam) bool { return param.name == name })
		if i < 0 {
			return imgErrorf("Invalid parameter '%s'", name)
		}
		param := &imgParams[p.format][i]
		if !given {
			value = "on"
		}
		value, err := param.canonical(value)
		if err != nil {
			return err
		}
		p.values[name] = value
	}
	return nil
}

// canonical checks value and returns it as qemu-img prints it.
func (param *imgParam) canonical(value string) (string, error) {
	switch param.kind {
	case paramSize:
		n, err := parseSize(value)
		if errors.Is(err, errSizeRange) {
			return "", imgErrorf("Value '%s' is out of range for parameter '%s'", value, param.name)
		}
		if err != nil {
			return "", imgErrorf("Parameter '%s' expects a non-negative number below 2^64\n"+
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"+
				"and exabytes, respectively.", param.name)
		}
		value = strconv.FormatUint(n, 10)
	case paramNumber:
		n, err := strconv.ParseUint(value, 0, 64)
		if err != nil {
			return "", imgErrorf("Parameter '%s' expects a number", param.name)
		}
		value = strconv.FormatUint(n, 10)
	case paramBool:
		if value != "on" && value != "off" {
			return "", imgErrorf("Parameter '%s' expects 'on' or 'off'", param.name)
		}
	}
	if param.refused != "" && value != param.refused {
		return "", imgErrorf("Parameter '%s' does not support value '%s' in this program", param.name, value)
	}
	return value, nil
}

func (p *imgParamValues) get(name string) string { return p.values[name] }

func (p *imgParamValues) set(name, value string) { p.values[name] = value }

// has reports whether the format knows the parameter name.
func (p *imgParamValues) has(name string) bool {
	return slices.ContainsFunc(imgParams[p.format], func(param imgParam) bool { return param.name == name })
}

// size returns the value of a size parameter, false if it is not set.
func (p *imgParamValues) size(name string) (int64, bool) {
	n, err := strconv.ParseUint(p.values[name], 10, 63)
	return int64(n), err == nil
}

// String formats the parameters as the line "Formatting …" has them.
func (p *imgParamValues) String() string {
	var b strings.Builder
	for _, param := range imgParams[p.format] {
		if value, ok := p.values[param.name]; ok {
			fmt.Fprintf(&b, " %s=%s", param.name, strings.ReplaceAll(value, ",", ",,"))
		}
	}
	return b.String()
}

// paramHelp returns the answer to "-o help": with the parameters of the host
// file if a target is named.
func paramHelp(format string, withHost bool) (string, error) {
	params, ok := imgParams[format]
	if !ok {
		return "", imgErrorf("Unknown file format '%s'", format)
	}
	sorted := slices.Clone(params)
	slices.SortFunc(sorted, func(a, b imgParam) int { return strings.Compare(a.name, b.name) })
	var b strings.Builder
	if withHost {
		b.WriteString("Supported options:\n")
	} else {
		fmt.Fprintf(&b, "Supported %s options:\n", format)
	}
	for _, param := range sorted {
		if param.host && !withHost {
			continue
		}
		fmt.Fprintf(&b, "  %-22s - %s\n", param.name+"="+string(param.kind), param.help)
	}
	if !withHost {
		b.WriteString("\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n")
	}
	return b.String(), nil
}

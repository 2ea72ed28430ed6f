package main

import (
	"errors"
	"slices"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want uint64
		err  error
	}{
		{"0", 0, nil}, {"512", 512, nil}, {"1k", 1024, nil}, {"1K", 1024, nil}, {"1M", 1 << 20, nil}, {"2G", 2 << 30, nil},
		{"3T", 3 << 40, nil}, {"1P", 1 << 50, nil}, {"15E", 15 << 60, nil}, {"16E", 0, errSizeRange}, {"7b", 7, nil}, {"7B", 7, nil},
		{"1.5G", 3 << 29, nil}, {".5k", 512, nil}, {"1.", 1, nil}, {"1.0", 1, nil}, {"1.5", 0, errSizeSyntax},
		{"0x10", 16, nil}, {"0XfF", 255, nil}, {"0x1_0", 0, errSizeSyntax}, {"0x", 0, errSizeSyntax},
		{"18446744073709551615", 1<<64 - 1, nil}, {"18446744073709551616", 0, errSizeRange}, {"0x10000000000000000", 0, errSizeRange},
		{"", 0, errSizeSyntax}, {"k", 0, errSizeSyntax}, {"-1", 0, errSizeSyntax}, {"+1", 0, errSizeSyntax}, {"1kk", 0, errSizeSyntax},
		{"1kb", 0, errSizeSyntax}, {"1 ", 0, errSizeSyntax}, {"1X", 0, errSizeSyntax}, {".", 0, errSizeSyntax}, {"1bB", 0, errSizeSyntax},
	} {
		if got, err := parseSize(tt.in); got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("parseSize(%q) = %d, %v; want %d, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 512: "512 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 200704: "196 KiB", 1023 << 10: "0.999 MiB",
		1 << 20: "1 MiB", 197120: "192 KiB", 64 << 20: "64 MiB", 1610612736: "1.5 GiB", 1 << 40: "1 TiB", 7 << 60: "7 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestImgSyntax(t *testing.T) {
	s := imgSyntax{short: "hf:qo:", long: map[string]string{"help": "h", "output": "output:", "format": "f:", "force-share": "U", "shrink": "shrink"}}
	for _, tt := range []struct {
		args     []string
		opts     []imgOption
		operands []string
		err      string
	}{
		{[]string{"a", "-f", "x", "b"}, []imgOption{{"f", "x"}}, []string{"a", "b"}, ""},
		{[]string{"-qfx", "-q", "a"}, []imgOption{{"q", ""}, {"f", "x"}, {"q", ""}}, []string{"a"}, ""},
		{[]string{"--output=json", "--format", "raw", "--out", "human"}, []imgOption{{"output", "json"}, {"f", "raw"}, {"output", "human"}}, nil, ""},
		{[]string{"--", "-f", "--x"}, nil, []string{"-f", "--x"}, ""},
		{[]string{"-", "--shrink"}, []imgOption{{"shrink", ""}}, []string{"-"}, ""},
		{[]string{"-o", "-q"}, []imgOption{{"o", "-q"}}, nil, ""},
		{[]string{"--f", "x"}, nil, nil, "unrecognized option '--f'"}, // format or force-share
		{[]string{"-z"}, nil, nil, "unrecognized option '-z'"},
		{[]string{"-:"}, nil, nil, "unrecognized option '-:'"},
		{[]string{"--shrink=x"}, nil, nil, "unrecognized option '--shrink=x'"},
		{[]string{"-f"}, nil, nil, "missing argument for option '-f'"},
		{[]string{"--output"}, nil, nil, "missing argument for option '--output'"},
		{[]string{"--image-opts"}, nil, nil, "option '--image-opts' is not supported"},
	} {
		opts, operands, err := s.parse(append([]string{"sub"}, tt.args...))
		text := ""
		if err != nil {
			text = err.Error()
		}
		if !slices.Equal(opts, tt.opts) || !slices.Equal(operands, tt.operands) || text != tt.err {
			t.Errorf("%q: %v, %q, %q; want %v, %q, %q", tt.args, opts, operands, text, tt.opts, tt.operands, tt.err)
		}
	}
}

func TestSplitOptions(t *testing.T) {
	for in, want := range map[string][]string{
		"":             {""},
		"a=b":          {"a=b"},
		"a=b,c":        {"a=b", "c"},
		"a=b,,c,d":     {"a=b,c", "d"},
		"a=,,,,b,,,c=": {"a=,,b,", "c="},
	} {
		if got := splitOptions(in); !slices.Equal(got, want) {
			t.Errorf("splitOptions(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestImgJSON(t *testing.T) {
	got := imgJSON([]any{map[string]any{"filename": "a\"\\\n\té\U0001f600", "format": true, "virtual-size": int64(-1)}, map[string]any{}})
	want := `[
    {
        "virtual-size": -1,
        "filename": "a\"\\\n\t\u00E9\uD83D\uDE00",
        "format": true
    },
    {
    }
]`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

package main

import "strings"

// An imgOption is an option as it was given: its letter or long name, and its argument.
type imgOption struct{ name, arg string }

// An imgSyntax lists the options of a subcommand as getopt(3) does.
type imgSyntax struct {
	short string            // letters; one with a colon takes an argument
	long  map[string]string // long name: the letter it stands for, or its own name; with a colon if it takes an argument
}

// imgRefused are options of qemu-img that need what this program does not
// have; they are refused by name instead of as unknown.
var imgRefused = map[string]bool{"object": true, "image-opts": true, "target-image-opts": true, "bitmaps": true, "salvage": true}

// parse splits args, whose first is the subcommand, into options and operands
// as getopt_long does: options may follow operands, letters may be clustered,
// long names may be shortened, and "--" ends the options.
func (s imgSyntax) parse(args []string) (opts []imgOption, operands []string, err error) {
	for i := 1; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return opts, append(operands, args[i+1:]...), nil
		case strings.HasPrefix(arg, "--"):
			name, value, inline := strings.Cut(arg[2:], "=")
			target, ok := s.longOption(name)
			if !ok {
				if imgRefused[name] {
					return nil, nil, imgErrorf("option '--%s' is not supported", name)
				}
				return nil, nil, imgUsagef("unrecognized option '%s'", arg)
			}
			target, takes := strings.CutSuffix(target, ":")
			switch {
			case inline && !takes:
				return nil, nil, imgUsagef("unrecognized option '%s'", arg)
			case takes && !inline:
				if i++; i == len(args) {
					return nil, nil, imgUsagef("missing argument for option '%s'", arg)
				}
				value = args[i]
			}
			opts = append(opts, imgOption{target, value})
		case len(arg) > 1 && arg[0] == '-':
			for at := 1; at < len(arg); at++ {
				letter := arg[at : at+1]
				j := strings.Index(s.short, letter)
				if j < 0 || letter == ":" {
					return nil, nil, imgUsagef("unrecognized option '%s'", arg)
				}
				if j+1 == len(s.short) || s.short[j+1] != ':' {
					opts = append(opts, imgOption{letter, ""})
					continue
				}
				value := arg[at+1:]
				if value == "" {
					if i++; i == len(args) {
						return nil, nil, imgUsagef("missing argument for option '%s'", arg)
					}
					value = args[i]
				}
				opts = append(opts, imgOption{letter, value})
				break
			}
		default:
			operands = append(operands, arg)
		}
	}
	return opts, operands, nil
}

// longOption finds the long option that name is, or begins alone.
func (s imgSyntax) longOption(name string) (string, bool) {
	if target, ok := s.long[name]; ok {
		return target, true
	}
	found, n := "", 0
	for long, target := range s.long {
		if strings.HasPrefix(long, name) && target != found {
			found, n = target, n+1
		}
	}
	return found, n == 1
}

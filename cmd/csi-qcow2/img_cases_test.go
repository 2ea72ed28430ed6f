package main

// imgCases are the command lines that img must answer as qemu-img 7.2 does.
var imgCases = map[string][]imgCase{
	"usage": {
		{lines: `
			frob
			-f
			--nonsense
			create
			create -z
			create -f
			create --foo
			create -f qcow2
			info
			info a b
			info --foo a
			info -Z a
			check
			map
			compare snap.qcow2
			convert
			convert snap.qcow2
			resize snap.qcow2
			rebase -u -b x
			snapshot
			measure
		`},
	},
	"create": {
		{lines: `
			create -f qcow2 n1.qcow2 64M
			create -f qcow2 -o cluster_size=4k,compat=0.10 n2.qcow2 64M
			create -f qcow2 -o lazy_refcounts=on,refcount_bits=32,compression_type=zstd,cluster_size=128k n3.qcow2 64M
			create -f qcow2 -o preallocation=metadata n4.qcow2 20M
			create -f qcow2 -o preallocation=falloc n5.qcow2 3M
			create -f qcow2 -o preallocation=full n6.qcow2 3M
			create -f qcow2 -b snap.qcow2 -F qcow2 n7.qcow2
			create -f qcow2 -b snap.qcow2 -F qcow2 n8.qcow2 100M
			create -f qcow2 -b raw.img -F raw n9.qcow2 4M
			create -f qcow2 -u -b nofile.qcow2 -F qcow2 n10.qcow2 10M
			create -f qcow2 n11.qcow2 1.5G
			create -f qcow2 n12.qcow2 1000
			create -f qcow2 n13.qcow2 0
			create -f qcow2 n14.qcow2 0x100000
			create -q -f qcow2 n15.qcow2 1T
			create -fqcow2 -qocluster_size=512 n16.qcow2 1M
			create n17.qcow2 -f qcow2 1M
			create -f qcow2 -o backing_file=snap.qcow2,backing_fmt=qcow2,size=20M n18.qcow2
			create -f qcow2 -o size=20M n19.qcow2
			create -f qcow2 -o compat=v2,backing_file=snap.qcow2 -o backing_fmt=qcow2 n20.qcow2
			create -f qcow2 'n,21.qcow2' 10M
			create -f qcow2 -b sub/rel.qcow2 -F qcow2 n22.qcow2
			create -f qcow2 -b ../snap.qcow2 -F qcow2 sub/n23.qcow2
			create -f qcow2 -b link.qcow2 -F qcow2 n24.qcow2
			create -f qcow2 -o cluster_size=2M,refcount_bits=1 n25.qcow2 1G
			create -f qcow2 -o nocow=off n26.qcow2 1M
			create -f qcow2 -o 'backing_file=sub/../snap.qcow2,,,backing_fmt=qcow2' -u x.qcow2 1M
			create n1.raw 10M
			create -f raw n2.raw 1000
			create -f raw -o preallocation=falloc n3.raw 1M
			create -f raw -o preallocation=full n4.raw 1M
			create -f raw -o preallocation=off n5.raw 0
			create -f qcow2 empty.qcow2 1M
			create -f qcow2 -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"odd.qcow2"}}' -F qcow2 n28.qcow2
		`},
		{lines: `
			create -f qcow2 -b snap.qcow2 x.qcow2
			create -f qcow2 -b nofile.qcow2 -F qcow2 x.qcow2
			create -f qcow2 -b nofile.qcow2 -F qcow2 x.qcow2 10M
			create -f qcow2 -u -b x -F foo x.qcow2 1M
			create -f qcow2 -u -b nofile.qcow2 -F qcow2 x.qcow2
			create -f qcow2 x.qcow2
			create -f raw x.raw
			create -f raw -b snap.qcow2 x.raw 10M
			create -f raw -F qcow2 x.raw 10M
			create -f qcow2 -o foo=bar x.qcow2 1M
			create -f qcow2 -o cluster_size=3k x.qcow2 1M
			create -f qcow2 -o cluster_size=4M x.qcow2 1M
			create -f qcow2 -o cluster_size=0 x.qcow2 1M
			create -f qcow2 -o cluster_size=abc x.qcow2 1M
			create -f qcow2 -o compat=0.9 x.qcow2 1M
			create -f qcow2 -o compat=v2,lazy_refcounts=on x.qcow2 1M
			create -f qcow2 -o compat=v2,refcount_bits=8 x.qcow2 1M
			create -f qcow2 -o compat=v2,compression_type=zstd x.qcow2 1M
			create -f qcow2 -o refcount_bits=3 x.qcow2 1M
			create -f qcow2 -o refcount_bits=128 x.qcow2 1M
			create -f qcow2 -o refcount_bits=x x.qcow2 1M
			create -f qcow2 -o compression_type=lz4 x.qcow2 1M
			create -f qcow2 -o preallocation=foo x.qcow2 1M
			create -f qcow2 -o lazy_refcounts=maybe x.qcow2 1M
			create -f qcow2 -o preallocation=full -b snap.qcow2 -F qcow2 x.qcow2
			create -f foo x.qcow2 1M
			create -f qcow2 -F qcow2 x.qcow2 1M
			create -f qcow2 -b snap.qcow2 -F foo x.qcow2
			create -f qcow2 x.qcow2 1X
			create -f qcow2 x.qcow2 ''
			create -f qcow2 x.qcow2 1.5
			create -f qcow2 x.qcow2 -1
			create -f qcow2 x.qcow2 9E
			create -f qcow2 x.qcow2 17E
			create -f qcow2 x.qcow2 1M 2M
			create -f qcow2 /nonexist/x.qcow2 1M
			create -f qcow2 sub 1M
			create -f qcow2 -o size=20M x.qcow2 10M
			create -f qcow2 -o cluster_size x 1M
			create -f qcow2 -o , x 1M
			create -f qcow2 -o '' x 1M
			create -f qcow2 -b x.qcow2 -F qcow2 x.qcow2 1M
			create -f foo -o help
		`},
	},
	"info": {
		{lines: `
			info empty.qcow2
			info v2.qcow2
			info --output=json v2.qcow2
			info snap.qcow2
			info --output=json snap.qcow2
			info --output json odd.qcow2
			info odd.qcow2
			info over.qcow2
			info -U --backing-chain top.qcow2
			info --backing-chain --output=json top.qcow2
			info sub/rel.qcow2
			info --output=json sub/rel.qcow2
			info --backing-chain sub/rel.qcow2
			info comp.qcow2
			info zstd.qcow2
			info raw.img
			info --output=json raw.img
			info tiny.img
			info --output=json --backing-chain raw.img
			info -f raw snap.qcow2
			info --format raw snap.qcow2
			info orphan.qcow2
			info link.qcow2
			info file:snap.qcow2
			info -- snap.qcow2
			info --out=json snap.qcow2
		`},
		{lines: `
			info nofile
			info -f foo snap.qcow2
			info -f qcow2 raw.img
			info -f qcow2 tiny.img
			info --output=xml snap.qcow2
			info --backing-chain orphan.qcow2
			info --backing-chain loop1.qcow2
			info .
			info foo:bar
			info --output
		`},
		{lines: `info other.vmdk`, differ: "we know the format but do not read it"},
	},
	"check": {
		{lines: `
			check empty.qcow2
			check --output=json empty.qcow2
			check snap.qcow2
			check --output=json snap.qcow2
			check -q snap.qcow2
			check comp.qcow2
			check --output=json comp.qcow2
			check zstd.qcow2
			check v2.qcow2
			check odd.qcow2
			check top.qcow2
			check -f qcow2 -U top.qcow2
			check prealloc.qcow2
			check raw.img
			check nofile
			check orphan.qcow2
			check -r foo snap.qcow2
			check -f qcow2 raw.img
			check -T foo snap.qcow2
			check --output=xml snap.qcow2
		`},
		{lines: `
			check leak.qcow2
			check --output=json leak.qcow2
			check -q leak.qcow2
			check -r leaks leak.qcow2
			check leak.qcow2
		`},
		{lines: "check -r all --output=json leak.qcow2"},
		{lines: "check -q -r all leak.qcow2"},
		{lines: "check -r all snap.qcow2"},
	},
	"map": {
		{lines: `
			map empty.qcow2
			map --output=json empty.qcow2
			map snap.qcow2
			map --output=json snap.qcow2
			map over.qcow2
			map --output=json over.qcow2
			map top.qcow2
			map --output=json top.qcow2
			map --output=json v2.qcow2
			map --output=json odd.qcow2
			map --output=json comp.qcow2
			map comp.qcow2
			map raw.img
			map --output=json raw.img
			map -f raw tiny.img
			map --output=json -f raw tiny.img
			map --output=json sub/rel.qcow2
			map sub/rel.qcow2
			map -s 64k -l 100k --output=json snap.qcow2
			map --start-offset=64k --max-length=100k snap.qcow2
			map -s 1000 -l 513 --output=json top.qcow2
			map -s 1G snap.qcow2
			map -s 1G --output=json snap.qcow2
			map -s foo snap.qcow2
			map -l -1 snap.qcow2
			map nofile
			map orphan.qcow2
			map -U --output=json snap.qcow2
		`},
	},
	"snapshot": {
		{lines: `
			snapshot -l snap.qcow2
			snapshot snap.qcow2
			snapshot -l empty.qcow2
			snapshot -d nope snap.qcow2
			snapshot -a nope snap.qcow2
			snapshot -d 1 snap.qcow2
			snapshot -c one snap.qcow2
			snapshot -l snap.qcow2
			snapshot -a one snap.qcow2
			snapshot -c three snap.qcow2
			snapshot -l -U snap.qcow2
			snapshot -q -d one snap.qcow2
			snapshot -l snap.qcow2
			snapshot -a 2 snap.qcow2
			snapshot -d two snap.qcow2
			snapshot -d one snap.qcow2
			snapshot -d three snap.qcow2
			snapshot -l snap.qcow2
			snapshot -c a v2.qcow2
			snapshot -a a v2.qcow2
			snapshot -c a odd.qcow2
			snapshot -c b comp.qcow2
			snapshot -d b comp.qcow2
			snapshot -c '' empty.qcow2
			snapshot -l empty.qcow2
			snapshot -l raw.img
			snapshot -c foo raw.img
			snapshot -l -c foo snap.qcow2
			snapshot -l nofile
			snapshot -l orphan.qcow2
		`},
	},
	"convert": {
		{lines: `
			convert snap.qcow2 c0.img
			convert -O raw snap.qcow2 c1.img
			convert -O qcow2 snap.qcow2 c2.qcow2
			convert -p -O qcow2 snap.qcow2 c3.qcow2
			convert -q -p -O qcow2 snap.qcow2 c4.qcow2
			convert -O qcow2 top.qcow2 c5.qcow2
			convert -O raw top.qcow2 c6.img
			convert -f qcow2 -O qcow2 -o cluster_size=512 over.qcow2 c7.qcow2
			convert -O qcow2 -o cluster_size=2M top.qcow2 c8.qcow2
			convert -c -O qcow2 top.qcow2 c9.qcow2
			convert -c -O qcow2 -o compression_type=zstd top.qcow2 c10.qcow2
			convert -c -W -m 4 -O qcow2 -o cluster_size=4k raw.img c11.qcow2
			convert -c -t writethrough -O qcow2 top.qcow2 c11w.qcow2
			convert -c -t directsync -O qcow2 over.qcow2 c11d.qcow2
			convert -W -m 16 -O qcow2 raw.img c12.qcow2
			convert -O qcow2 comp.qcow2 c13.qcow2
			convert -O qcow2 zstd.qcow2 c14.qcow2
			convert -B snap.qcow2 -F qcow2 -O qcow2 over.qcow2 c15.qcow2
			convert -B snap.qcow2 -F qcow2 -c -O qcow2 over.qcow2 c16.qcow2
			convert -B empty.qcow2 -F qcow2 -O qcow2 snap.qcow2 c17.qcow2
			convert -B over.qcow2 -F qcow2 -O qcow2 -o cluster_size=64k top.qcow2 c18.qcow2
			convert -O qcow2 -o backing_file=snap.qcow2,backing_fmt=qcow2 over.qcow2 c19.qcow2
			convert -l two -O qcow2 snap.qcow2 c20.qcow2
			convert -l snapshot.id=2 -O raw snap.qcow2 c21.img
			convert -l snapshot.name=one -O qcow2 snap.qcow2 c22.qcow2
			convert -l 1 -O qcow2 snap.qcow2 c23.qcow2
			convert -O qcow2 -o preallocation=metadata snap.qcow2 c24.qcow2
			convert -O qcow2 -o preallocation=full snap.qcow2 c25.qcow2
			convert -O raw -o preallocation=falloc snap.qcow2 c26.img
			convert -O qcow2 snap.qcow2 raw.img c27.qcow2
			convert -S 0 -O raw snap.qcow2 c28.img
			convert -S 0 -O qcow2 snap.qcow2 c29.qcow2
			convert -S 64k -O raw snap.qcow2 c30.img
			convert -t none -T none -O qcow2 snap.qcow2 c31.qcow2
			convert -t writethrough -O qcow2 snap.qcow2 c32.qcow2
			convert -t directsync -O raw over.qcow2 c33.img
			convert -O qcow2 -f raw tiny.img c34.qcow2
			convert -O raw -f raw tiny.img c35.img
			convert -O qcow2 -o compat=0.10,cluster_size=1k over.qcow2 c36.qcow2
			convert -O qcow2 -o compat=0.10 -B snap.qcow2 -F qcow2 over.qcow2 c37.qcow2
			convert -O qcow2 sub/rel.qcow2 c38.qcow2
			convert -O raw -o size=1M snap.qcow2 c39.img
			convert -n -O qcow2 snap.qcow2 empty.qcow2
			convert -n -O raw v2.qcow2 raw.img
			convert -C -O raw snap.qcow2 c40.img
			convert -O qcow2 odd.qcow2 c41.qcow2
			convert -O qcow2 prealloc.qcow2 c42.qcow2
			convert -n --target-is-zero -O qcow2 odd.qcow2 prealloc.qcow2
		`},
		{lines: `
			convert -O foo snap.qcow2 z
			convert -f foo snap.qcow2 z
			convert -f raw -O qcow2 nofile z
			convert -c -O raw snap.qcow2 z
			convert -S 1000 -O raw snap.qcow2 z
			convert -S foo -O raw snap.qcow2 z
			convert -S 1G -O raw snap.qcow2 z
			convert -m 17 -O raw snap.qcow2 z
			convert -m x -O raw snap.qcow2 z
			convert -n -O qcow2 snap.qcow2 nonex
			convert -n -O raw snap.qcow2 nonex
			convert -n -o cluster_size=4k -O qcow2 snap.qcow2 empty.qcow2
			convert --target-is-zero -O qcow2 snap.qcow2 z
			convert -B empty.qcow2 -O qcow2 snap.qcow2 z
			convert -F qcow2 -O qcow2 snap.qcow2 z
			convert -l snapshot.foo=two -O qcow2 snap.qcow2 z
			convert -l nope -O qcow2 snap.qcow2 z
			convert -l nope -O raw raw.img z
			convert -T foo -O qcow2 snap.qcow2 z
			convert -C -S 4k -O raw snap.qcow2 z
			convert -C -c -O qcow2 snap.qcow2 z
			convert -O qcow2 snap.qcow2 /nonex/x
			convert -O qcow2 -o nope=1 snap.qcow2 z
			convert -O qcow2 -c -o preallocation=full snap.qcow2 z
			convert -O raw -B empty.qcow2 -F qcow2 snap.qcow2 z
			convert -O qcow2 snap.qcow2 snap.qcow2
			convert -O qcow2 orphan.qcow2 z
			convert -n -O raw snap.qcow2 raw.img
			convert -n -O qcow2 snap.qcow2 v2.qcow2
			convert -O raw -o help
			convert -O foo -o help
		`},
	},
	"convert-litter": {
		{lines: "convert -t foo -O qcow2 snap.qcow2 z", litter: "z"},
	},
	"compare": {
		{lines: `
			compare snap.qcow2 comp.qcow2
			compare -s snap.qcow2 comp.qcow2
			compare -p snap.qcow2 comp.qcow2
			compare -p -q snap.qcow2 comp.qcow2
			compare -q snap.qcow2 empty.qcow2
			compare snap.qcow2 empty.qcow2
			compare empty.qcow2 snap.qcow2
			compare snap.qcow2 raw.img
			compare -s snap.qcow2 raw.img
			compare -s snap.qcow2 snap.qcow2
			compare -U -s snap.qcow2 link.qcow2
			compare over.qcow2 top.qcow2
			compare top.qcow2 over.qcow2
			compare over.qcow2 snap.qcow2
			compare -f raw -F raw snap.qcow2 snap.qcow2
			compare empty.qcow2 prealloc.qcow2
			compare prealloc.qcow2 empty.qcow2
			compare -s comp.qcow2 zstd.qcow2
			compare -q snap.qcow2 nofile
			compare nofile snap.qcow2
			compare -f foo snap.qcow2 empty.qcow2
			compare -T foo snap.qcow2 empty.qcow2
		`},
	},
	"resize": {
		{lines: `
			resize empty.qcow2 80M
			resize empty.qcow2 +16M
			resize empty.qcow2 +0
			resize -q empty.qcow2 200M
			resize snap.qcow2 100M
			resize over.qcow2 1T
			resize v2.qcow2 +1M
			resize odd.qcow2 2M
			resize -f raw raw.img 30M
			resize -f raw --shrink raw.img 10M
			resize -f raw raw.img +100
			resize -f raw --preallocation=full raw.img +1M
			resize -f raw --preallocation=falloc raw.img +1M
			resize raw.img 20M
		`},
		{lines: `
			resize empty.qcow2 -16M
			resize empty.qcow2 10M
			resize empty.qcow2
			resize empty.qcow2 foo
			resize nofile 10M
			resize -f raw raw.img 1M
			resize --preallocation=foo empty.qcow2 +10M
			resize --preallocation=metadata -f raw raw.img +1M
			resize empty.qcow2 200M extra
			resize empty.qcow2 0
			resize empty.qcow2 1000M1
			resize empty.qcow2 67109000
			resize --preallocation=full --shrink empty.qcow2 10M
			resize empty.qcow2 -100M
		`},
	},
	"rebase": {
		{lines: `
			rebase -u -b empty.qcow2 -F qcow2 over.qcow2
			rebase -u -b nofile -F raw orphan.qcow2
			rebase -u -b '' top.qcow2
			rebase -u orphan.qcow2
			rebase -u -f qcow2 -b ../snap.qcow2 -F qcow2 sub/rel.qcow2
			rebase -u -p -q -b snap.qcow2 -F qcow2 empty.qcow2
			rebase -u -b raw.img -F raw v2.qcow2
			rebase -u -t writethrough -b empty.qcow2 -F qcow2 prealloc.qcow2
			rebase -u -t directsync -b empty.qcow2 -F qcow2 odd.qcow2
			rebase -u -b nofile snap.qcow2
			rebase -u -b nofile -F foo snap.qcow2
			rebase -u -t foo -b nofile -F raw snap.qcow2
			rebase -u -T foo -b nofile -F raw snap.qcow2
			rebase -u -b x -F raw nofile
		`},
		{lines: "rebase -u -b snap.qcow2 raw.img"},
	},
	"measure": {
		{lines: `
			measure -O qcow2 --size 1G
			measure -O raw --size 1G
			measure --size 12345
			measure --output=json -O qcow2 --size 1G
			measure -O qcow2 --size 5T
			measure -O qcow2 -o cluster_size=512 --size 1G
			measure -O qcow2 -o refcount_bits=64,cluster_size=2M --size 100T
			measure -O qcow2 -o cluster_size=4k,preallocation=full --size 1G
			measure -O qcow2 -o preallocation=metadata --size 1G
			measure -O qcow2 snap.qcow2
			measure -O qcow2 over.qcow2
			measure -O qcow2 top.qcow2
			measure -O qcow2 -o cluster_size=2M top.qcow2
			measure -O qcow2 comp.qcow2
			measure -O qcow2 v2.qcow2
			measure -O qcow2 -o compat=0.10 snap.qcow2
			measure -O raw snap.qcow2
			measure --output=json -O qcow2 -l two snap.qcow2
			measure --output=json -O raw -l two snap.qcow2
			measure -O qcow2 raw.img
			measure -O qcow2 -f raw tiny.img
			measure --output=json -O qcow2 sub/rel.qcow2
		`},
		{lines: `
			measure
			measure --size 1G snap.qcow2
			measure -O foo --size 1G
			measure --size x
			measure -f qcow2 --size 1G
			measure -o foo=1 -O qcow2 --size 1G
			measure -O qcow2 -o cluster_size=3 --size 1G
			measure -O qcow2 nofile
			measure -O qcow2 -l nope snap.qcow2
			measure a b
			measure --output=xml --size 1G
		`},
	},
}


add_scaled_gfx950.co:	file format elf64-amdgpu

Disassembly of section .text:

0000000000001700 <add_scaled>:
	s_load_dwordx8 s[4:11], s[0:1], 0x0                        // 000000001700: C00E0100 00000000
	v_lshl_or_b32 v2, s2, 7, v0                                // 000000001708: D2000002 04010E02
	v_mov_b32_e32 v1, 0                                        // 000000001710: 7E020280
	v_ashrrev_i32_e32 v3, 31, v2                               // 000000001714: 2206049F
	s_waitcnt lgkmcnt(0)                                       // 000000001718: BF8CC07F
	v_cmp_gt_i32_e32 vcc, s11, v2                              // 00000000171C: 7D88040B
	s_and_saveexec_b64 s[0:1], vcc                             // 000000001720: BE80206A
	s_cbranch_execz 6                                          // 000000001724: BF880006 <add_scaled+0x40>
	v_mov_b32_e32 v4, s6                                       // 000000001728: 7E080206
	v_mov_b32_e32 v5, s7                                       // 00000000172C: 7E0A0207
	v_lshl_add_u64 v[4:5], v[2:3], 2, v[4:5]                   // 000000001730: D2080004 04110502
	global_load_dword v1, v[4:5], off                          // 000000001738: DC508000 017F0004
	s_or_b64 exec, exec, s[0:1]                                // 000000001740: 87FE007E
	v_lshlrev_b32_e32 v4, 2, v0                                // 000000001744: 24080082
	s_waitcnt vmcnt(0)                                         // 000000001748: BF8C0F70
	ds_write_b32 v4, v1                                        // 00000000174C: D81A0000 00000104
	s_waitcnt lgkmcnt(0)                                       // 000000001754: BF8CC07F
	s_barrier                                                  // 000000001758: BF8A0000
	s_and_saveexec_b64 s[0:1], vcc                             // 00000000175C: BE80206A
	s_cbranch_execz 16                                         // 000000001760: BF880010 <add_scaled+0xa4>
	v_lshlrev_b64 v[2:3], 2, v[2:3]                            // 000000001764: D28F0002 00020482
	v_lshl_add_u64 v[4:5], s[4:5], 0, v[2:3]                   // 00000000176C: D2080004 04090004
	global_load_dword v4, v[4:5], off                          // 000000001774: DC508000 047F0004
	v_xor_b32_e32 v0, 1, v0                                    // 00000000177C: 2A000081
	v_lshlrev_b32_e32 v0, 2, v0                                // 000000001780: 24000082
	ds_read_b32 v0, v0                                         // 000000001784: D86C0000 00000000
	s_waitcnt vmcnt(0) lgkmcnt(0)                              // 00000000178C: BF8C0070
	v_fmac_f32_e32 v4, s10, v0                                 // 000000001790: 7608000A
	v_lshl_add_u64 v[0:1], s[8:9], 0, v[2:3]                   // 000000001794: D2080000 04090008
	global_store_dword v[0:1], v4, off                         // 00000000179C: DC708000 007F0400
	s_endpgm                                                   // 0000000017A4: BF810000
